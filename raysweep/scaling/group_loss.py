"""Laws of the loss over the cells of a group: one point a cell, the loss at its optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.scaling.fitting import HUBER
from raysweep.scaling.holdout import Candidate, aicc, held_out, levels
from raysweep.scaling.laws import LOSS_LAWS
from raysweep.scaling.loss_fit import LossFit

ONE_ARCHITECTURE_LAWS = ("chinchilla", "kaplan")
"""Tried on the cells of one architecture."""

JOINT_LAWS = ("wang", "yun", "clark", "joint_moe", "sparsity", "fine_grained")
"""Tried on dense and MoE cells together."""

BINS_PER_OCTAVE = 2
"""Batches this near count as one for the three-term law."""

RESAMPLED = 2
"""Laws of a group whose predictions of unseen cells get an interval."""

NON_EMBEDDING = {
    "params_total": "params_total_non_embedding",
    "params_active": "params_active_non_embedding",
}
"""What stands in for a count that a table lacks."""


@dataclass(frozen=True)
class NotFitted:
    """A law of the loss that these cells cannot even be given to, with why."""

    name: str
    message: str
    status: str = "missing input"

    @property
    def ok(self) -> bool:
        return False

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"law": self.name, "status": self.status, "message": self.message}


@dataclass(frozen=True)
class Unseen:
    """A cell that a law of the loss predicted without having seen it; the interval, NaN without
    resamples, is that of a new run."""

    cell: str
    observed: float
    predicted: float
    low: float
    high: float


@dataclass(frozen=True)
class LossCheck:
    """How a law of the loss does on scales it has not seen; NaN where it could not be tried.

    `error` is the mean |ln(predicted / observed)| over the largest scale, predicted from the
    smaller ones; `extrapolation` the factor in parameters between the two; `aicc` as of
    `holdout.aicc`; `unseen` each cell of that scale.
    """

    error: float
    n_test: int
    extrapolation: float
    aicc: float
    unseen: tuple[Unseen, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return asdict(self)


def check_loss_law(
    fit: LossFit | NotFitted, cells: pd.DataFrame, *, n_boot: int = 200, seed: int = 0
) -> LossCheck:
    """Leave out the largest scale of the cells that a law was fitted to, and predict it.

    `cells` are those of `fit_loss_law`: rows without a loss are left."""
    known = cells[cells["loss"].notna()]
    if not isinstance(fit, LossFit) or not fit.ok:
        return LossCheck(math.nan, 0, math.nan, math.nan)
    scale = known["params_active_non_embedding"].to_numpy(float)
    level = levels(scale)
    held = level == level.max()
    if held.all():
        return LossCheck(math.nan, 0, math.nan, aicc(fit))
    tried = held_out(
        Candidate(fit.law),
        fit.inputs,
        fit.loss,
        scale,
        held,
        cells=fit.cells,
        bootstrap=n_boot,
        trial_noise=_trial_noise(known),
    )
    if not tried.fit.ok:
        return LossCheck(math.nan, int(held.sum()), tried.extrapolation, aicc(fit))
    low = high = np.full(int(held.sum()), math.nan)
    if tried.fit.samples is not None and len(tried.fit.samples) > 1:
        columns = {name: np.asarray(v)[held] for name, v in fit.inputs.items()}
        low, high = tried.fit.interval(columns, new_observation=True, seed=seed)
    unseen = zip(known.index[held], tried.observed, tried.predicted, low, high, strict=True)
    return LossCheck(
        error=tried.mean_log_error,
        n_test=int(held.sum()),
        extrapolation=tried.extrapolation,
        aicc=aicc(fit),
        unseen=tuple(Unseen(str(c), *(float(v) for v in values)) for c, *values in unseen),
    )


def check_loss_laws(
    fits: Mapping[str, LossFit | NotFitted],
    cells: pd.DataFrame,
    *,
    n_boot: int = 200,
    seed: int = 0,
) -> dict[str, LossCheck]:
    """The check of each law; the `RESAMPLED` that predict best get intervals, which take long."""
    checks = {key: check_loss_law(fit, cells, n_boot=0) for key, fit in fits.items()}
    tried = [key for key, check in checks.items() if math.isfinite(check.error)]
    for key in sorted(tried, key=lambda k: checks[k].error)[:RESAMPLED]:
        checks[key] = check_loss_law(fits[key], cells, n_boot=n_boot, seed=seed)
    return checks


def loss_inputs(cells: pd.DataFrame, law: str) -> tuple[dict[str, np.ndarray], str]:
    """The inputs that a law reads, one value a row of `cells`, and the column that serves as N.

    UserError names a column that the law needs and the cells lack.
    """
    definition = LOSS_LAWS[law]
    count = definition.parameter_count
    if not _complete(cells, count):
        count = NON_EMBEDDING.get(count, count)
    columns = {
        "params": count,
        "tokens": "tokens",
        "flops": "flops",
        "experts": "experts",
        "granularity": "granularity",
        "batch_tokens": "batch_tokens",
        "steps": "steps",
    }
    inputs = {}
    for name in definition.inputs:
        if name == "sparsity":
            inputs[name] = 1 - (cells["top_k"] / cells["experts"]).to_numpy(float)
            continue
        column = columns[name]
        if not _complete(cells, column):
            raise UserError(f"law {law!r} needs the column {column!r}, which these cells lack")
        inputs[name] = cells[column].to_numpy(float)
    return inputs, count


def fit_loss_law(
    cells: pd.DataFrame,
    law: str,
    *,
    n_boot: int = 200,
    seed: int = 0,
) -> LossFit | NotFitted:
    """Fit one law of `LOSS_LAWS` to the column `loss` of a cell table; rows without it are left."""
    if law not in LOSS_LAWS:
        raise UserError(f"unknown law of the loss {law!r}; known: {', '.join(LOSS_LAWS)}")
    known = cells[cells["loss"].notna()]
    try:
        inputs, _ = loss_inputs(known, law)
    except UserError as error:
        return NotFitted(law, str(error))
    if not len(known):
        return NotFitted(law, f"no finished trial tells all of {_listed(law)}", "too few cells")
    loss = known["loss"].to_numpy(float)
    groups = known["cell_group"].to_numpy() if "cell_group" in known else known.index.to_numpy()
    # Three cells leave no freedom for a floor, and cannot tell which of them is a stray: Kaplan's
    # own form by least squares is all there is.
    bare = law == "kaplan" and len(known) == 3
    return LOSS_LAWS[law].fit(
        inputs,
        loss,
        cells=groups,
        fixed={"E0": 0.0} if bare else None,
        huber=1.0 if bare else HUBER,
        bootstrap=n_boot,
        trial_noise=_trial_noise(known),
        seed=seed,
    )


def fit_loss_laws(
    cells: pd.DataFrame, laws: Sequence[str], *, n_boot: int = 200, seed: int = 0
) -> dict[str, LossFit | NotFitted]:
    """Several laws over one group, by key."""
    return {law: fit_loss_law(cells, law, n_boot=n_boot, seed=seed) for law in laws}


def batch_table(cells: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The best trial of each half octave of batch of each cell: what the three-term law is
    fitted on.

    Columns as in `cells`, with `batch_tokens`, `steps`, `loss`, and `cell_group` for resampling.
    """
    known = trials[(trials["batch_tokens"] > 0) & trials["cell"].isin(cells.index)]
    # Where batches are drawn from a continuous range each has one trial, at any learning rate: only
    # neighbours tell what a batch can reach. Grids of powers of two, or of sqrt 2, stay as they
    # are.
    bins = np.round(BINS_PER_OCTAVE * np.log2(known["batch_tokens"].to_numpy(float)))
    best = known.loc[known["loss"].groupby([known["cell"], bins]).idxmin()]
    table = cells.loc[best["cell"]].drop(columns=["loss"], errors="ignore").reset_index()
    batch = best["batch_tokens"].to_numpy(float)
    return table.assign(
        cell_group=table["cell"],
        batch_tokens=batch,
        steps=table["tokens"].to_numpy(float) / batch,
        loss=best["loss"].to_numpy(float),
    )


def predict_loss(
    fits: Mapping[str, LossFit | NotFitted], order: Sequence[str], inputs: Mapping[str, float]
) -> tuple[str, float, float, float] | None:
    """(law, loss, low, high) at one point by the first fitted law of `order` whose inputs are
    given.

    `inputs` holds `tokens`, `flops`, `experts`, `top_k` and parameter counts by column. The
    interval is that of a new run; NaN where the law was not resampled. None where no law can
    tell.
    """
    for key in order:
        fit = fits.get(key)
        if not isinstance(fit, LossFit) or not fit.ok:
            continue
        count = inputs.get(fit.law.parameter_count)
        if count is None or not math.isfinite(count):
            count = inputs.get(NON_EMBEDDING.get(fit.law.parameter_count, ""), math.nan)
        point = {**inputs, "params": count, "sparsity": 1 - inputs["top_k"] / inputs["experts"]}
        wanted = {name: np.array([point[name]]) for name in fit.law.inputs if name in point}
        if len(wanted) < len(fit.law.inputs) or not np.isfinite(list(wanted.values())).all():
            continue
        value = float(fit.predict(wanted)[0])
        if fit.samples is None or len(fit.samples) < 2:
            return key, value, math.nan, math.nan
        low, high = fit.interval(wanted, new_observation=True)
        return key, value, float(low[0]), float(high[0])
    return None


def _listed(law: str) -> str:
    return ", ".join((*LOSS_LAWS[law].inputs, "loss"))


def _complete(cells: pd.DataFrame, column: str) -> bool:
    return column in cells and bool(cells[column].notna().all())


def _trial_noise(cells: pd.DataFrame) -> np.ndarray | float:
    """sd of ln loss at each optimum, where it is known."""
    if "loss_se" not in cells:
        return 0.0
    relative = (cells["loss_se"] / cells["loss"]).to_numpy(float)
    return np.nan_to_num(relative)
