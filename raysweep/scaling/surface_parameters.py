"""The surface model's settings, data and parameters: meaning, layout and prior."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from raysweep.scaling.surface_features import Covariates
from raysweep.scaling.surface_shape import PARAMETERS, TERMS, gap_derivatives

_CONSTANTS = (
    "log_weight_mean",
    "guess_weight",
    "far",
    "roughness_length",
    "roughness_share",
    "student",
)


@dataclass(frozen=True)
class SurfaceSettings:
    """Prior widths and constants of the surface model. Logs are natural; widths are sds.

    A width called guess is learned from the data; the guess counts as `guess_weight` observations.
    """

    law_intercept: float = 1.2  # of the optimum's (ln lr, ln batch) about the published law
    law_exponent: float = 0.3  # of each exponent about the published law's
    law_family: float = 0.3  # offset of an MoE family
    log_weight: float = 1.5  # of each ln weight of the valley's terms, about log_weight_mean
    log_weight_mean: float = math.log(0.003)
    log_rate: float = 0.3  # of the ln rates that stretch the valley's axes
    scale_slope: float = 0.15  # of the valley's ln depth per nat of parameters or tokens
    level_intercept: float = 3.0  # of ln loss
    level_slope: float = 0.3
    shift_guess: float = 0.1  # random effect of a cell on its optimum, in ln lr and ln batch
    level_guess: float = 0.03  # random effect of a cell on its ln loss
    noise_guess: float = 0.002  # sd of ln loss at the optimum
    growth_guess: float = 0.2  # noise sd per unit of gap
    guess_weight: float = 1.0
    far: float = 0.1  # a gap beyond this carries no more than "at least this far"
    diverged_distance: float = 1.0  # ln lr of a diverged run above its cell's optimum, at least
    diverged_sd: float = 0.5  # and how surely
    roughness_length: float = 0.25  # runs closer than this, in ln units, share their luck
    roughness_share: float = 0.5  # of a run's deviation: what would recur at the same point
    student: float = 6.0  # degrees of freedom of the noise: outliers weigh less

    def scaled(self, factor: float) -> SurfaceSettings:
        """Every prior width and guess times `factor`: to see how much the answers lean on them."""
        widths = {k: v * factor for k, v in vars(self).items() if k not in _CONSTANTS}
        return replace(self, **widths)


DEFAULT = SurfaceSettings()


@dataclass(frozen=True)
class Observations:
    """Trials as arrays of equal length: cell index, (ln lr, ln batch tokens), ln loss, and kind."""

    cell: np.ndarray  # [n] int
    point: np.ndarray  # [n, 2]
    log_loss: np.ndarray  # [n]; unused where `diverged`
    diverged: np.ndarray  # [n] bool: only "the learning rate is too high" is known
    variance: np.ndarray  # [n]: known variance of ln loss, added to the learned noise


@dataclass(frozen=True)
class Layout:
    """Where each block lies in the vector of shared parameters, for k regressors."""

    regressors: int

    @property
    def law(self) -> tuple[slice, slice]:
        """Of ln lr* and ln batch*, about the published law."""
        k = self.regressors
        return slice(0, k), slice(k, 2 * k)

    @property
    def valley(self) -> slice:
        """Of the valley's ln weights and ln rates."""
        return slice(2 * self.regressors, 2 * self.regressors + PARAMETERS)

    @property
    def scale(self) -> slice:
        """Of the valley's ln depth, per nat of parameters and of tokens."""
        start = self.valley.stop
        return slice(start, start + 2)

    @property
    def level(self) -> slice:
        """Of ln loss at the optimum."""
        return slice(self.scale.stop, self.scale.stop + self.regressors)

    @property
    def size(self) -> int:
        """Number of shared parameters."""
        return self.level.stop


def prior_of(
    covariates: Covariates, settings: SurfaceSettings, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the shared parameters; `level` is a typical ln loss."""
    names = covariates.names
    layout = Layout(1 + len(names))
    mean, sd = np.zeros(layout.size), np.ones(layout.size)
    slopes = [
        settings.law_family if name.startswith("experts") else settings.law_exponent
        for name in names
    ]
    for block in layout.law:
        sd[block] = [settings.law_intercept, *slopes]
    valley = layout.valley.start
    mean[valley : valley + TERMS] = settings.log_weight_mean
    sd[valley : valley + TERMS] = settings.log_weight
    sd[valley + TERMS : layout.valley.stop] = settings.log_rate
    sd[layout.scale] = settings.scale_slope
    mean[layout.level.start] = level
    sd[layout.level] = [settings.level_intercept, *[settings.level_slope] * len(names)]
    return mean, sd


def predict_rows(
    shared: np.ndarray, own: np.ndarray, regressors: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of ln loss and their derivatives.

    Args:
        shared: [S] parameters.
        own: [n, 3], the parameters of each row's cell.
        regressors: [n, k], of each row's cell.
        offset: [n, 2], each row's point less the published law's optimum of its cell.

    Returns:
        ln loss [n], gap [n], and the Jacobian of ln loss by shared [n, S] and own parameters [n,
        3].
    """
    layout = Layout(regressors.shape[1])
    laws = np.stack([shared[law] for law in layout.law], -1)
    u, v = (offset - regressors @ laws - own[:, 1:]).T
    scale = np.exp(regressors[:, 1:3] @ shared[layout.scale])
    value, by_point, by_valley = gap_derivatives(u, v, shared[layout.valley])
    value, by_point = value * scale, by_point * scale[:, None]
    by_shared = np.empty((len(regressors), layout.size))
    for axis, law in enumerate(layout.law):
        by_shared[:, law] = -by_point[:, axis, None] * regressors
    by_shared[:, layout.valley] = by_valley * scale[:, None]
    by_shared[:, layout.scale] = value[:, None] * regressors[:, 1:3]
    by_shared[:, layout.level] = regressors
    by_own = np.column_stack([np.ones(len(regressors)), -by_point])
    log_loss = regressors @ shared[layout.level] + own[:, 0] + value
    return log_loss, value, by_shared, by_own
