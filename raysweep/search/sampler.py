"""The ladder sampler: proposes a cell's next trial from what all cells have taught."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial
from scipy.special import ndtr

from raysweep.scaling.optima.hyperparameters import LEAST_RUNS, Parabola
from raysweep.scaling.optima.surface import Surface
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.study.shape import RunSize

_DRAWS = 128
_RATES = 21  # candidate learning rates across the range, beside 13 about the optimum
_GRAIN = 1.7  # half a grid's step over the rms distance to its nearest point, sqrt(3)
_LAW_WEIGHT = 0.5  # of the laws' expected gap beside the cell's own


class RelativeSampler(BaseSampler):
    """A sampler of one given space, whose parameters it proposes together."""

    def __init__(self, space: dict[str, BaseDistribution], seed: int) -> None:
        self._space = space
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The space given at construction."""
        return self._space

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Any other parameter is drawn at random, each on its own."""
        seed = (self._seed + trial.number + zlib.crc32(param_name.encode())) % 2**32
        return RandomSampler(seed=seed).sample_independent(
            study, trial, param_name, param_distribution
        )


class LadderSampler(RelativeSampler):
    """Asks where a run should lower this cell's loss gap and the laws' uncertainty the most.

    Of each candidate point it adds, in units of relative loss: the expected improvement over the
    best trial so far; the expected fall of the gap of what would be recommended for this cell; and
    that of what the laws alone would recommend in every cell. All three come from joint posterior
    draws of the surface model; running trials count as if their outcome were known but for its
    value. Draws depend on the seed, the cell and the trial's number only.
    """

    def __init__(
        self,
        cell: RunSize,
        history: TrialHistory,
        space: dict[str, BaseDistribution],
        sequence_length: int,
        *,
        seed: int,
    ) -> None:
        super().__init__(space, seed)
        self._cell = cell
        self._history = history
        self._sequence_length = sequence_length

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The candidate of the highest score."""
        self._history.register(self._cell, study, sequence_length=self._sequence_length)
        rng = np.random.default_rng(
            [self._seed, zlib.crc32(self._cell.name.encode()), trial.number]
        )
        surface = self._history.surface()
        candidates = self._candidates(surface)
        pending = self._history.pending(self._cell.name, besides=trial.number)
        history = self._history.trials_of(self._cell.name)
        tried = np.log(np.column_stack([history.learning_rate, history.batch_tokens]))
        scores = acquisition(
            surface,
            self._cell,
            candidates,
            tried,
            np.log(history.loss),
            pending,
            rng,
            # Points closer than the grain at which trials really run are one point.
            np.hypot(surface.settings.roughness_length, _GRAIN * self._history.granularity()),
        )
        best = candidates[int(scores.argmax())]
        rate, batch = self._space[LEARNING_RATE], self._space[LOG2_BATCH]
        assert isinstance(rate, FloatDistribution)
        learning_rate = float(np.clip(np.exp(best[0]), rate.low, rate.high))
        log2_batch = (best[1] - np.log(self._sequence_length)) / np.log(2)
        if isinstance(batch, IntDistribution):
            return {LEARNING_RATE: learning_rate, LOG2_BATCH: round(float(log2_batch))}
        assert isinstance(batch, FloatDistribution)
        return {
            LEARNING_RATE: learning_rate,
            LOG2_BATCH: float(np.clip(log2_batch, batch.low, batch.high)),
        }

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A further hyperparameter: where one parabola, drawn from what all cells tell of it, is
        lowest (Thompson sampling); at random until they tell something."""
        points = self._history.further(param_name)
        if len(points.value) < LEAST_RUNS or not isinstance(param_distribution, FloatDistribution):
            return super().sample_independent(study, trial, param_name, param_distribution)
        low, high = param_distribution.low, param_distribution.high
        parabola = Parabola(points, param_distribution.log, low, high)
        place = f"{self._cell.name} {param_name}".encode()
        rng = np.random.default_rng([self._seed, zlib.crc32(place), trial.number])
        z = parabola.lowest(parabola.draw(rng, 1), self._cell.params_active_non_embedding)
        return float(np.clip(parabola.value(z)[0], low, high))

    def _candidates(self, surface: Surface) -> np.ndarray:
        """Points (ln learning rate, ln batch tokens): a grid, finer about the optimum."""
        rate, batch = self._space[LEARNING_RATE], self._space[LOG2_BATCH]
        assert isinstance(rate, FloatDistribution)
        assert isinstance(batch, FloatDistribution | IntDistribution)
        optimum = surface.optimum(self._cell)
        low, high = np.log([rate.low, rate.high])
        near = optimum.mean[0] + np.linspace(-0.6, 0.6, 13)
        rates = np.unique(
            np.r_[np.linspace(low, high, _RATES), np.clip(near, low, high)]
            .round(12)
            .clip(low, high)
        )
        if isinstance(batch, IntDistribution):
            log2 = np.arange(batch.low, batch.high + 1, dtype=float)
        else:
            centre = (optimum.mean[1] - np.log(self._sequence_length)) / np.log(2)
            near = np.clip(centre + np.linspace(-0.8, 0.8, 9), batch.low, batch.high)
            log2 = np.unique(np.r_[np.linspace(batch.low, batch.high, 13), near])
        batches = log2 * np.log(2) + np.log(self._sequence_length)
        grid = np.stack(np.meshgrid(rates, batches, indexing="ij"), -1).reshape(-1, 2)
        return grid


def acquisition(
    surface: Surface,
    cell: RunSize,
    candidates: np.ndarray,
    tried: np.ndarray,
    log_loss: np.ndarray,
    pending: np.ndarray,
    rng: np.random.Generator,
    length: np.ndarray,
) -> np.ndarray:
    """The score of each candidate, in expected relative loss. Points are [n, 2] logs.

    `log_loss` [n] are the outcomes at `tried`, nan where diverged; `length` [2] is how close, in ln
    learning rate and ln batch, two runs share their luck.
    """
    points = np.concatenate([candidates, tried, pending])
    draws = surface.sample_cell(cell, points, _DRAWS, rng)
    count = len(candidates)
    gaps = np.minimum(draws.gaps, surface.settings.far)
    noise = surface.noise_variance(gaps.mean(0))
    # Runs close to each other end alike, luck included: a repeat shows little that is new.
    alike = _alike(candidates, points[count:], length)
    fresh = 1.0 - alike**2
    outcome = draws.levels[:, None] + gaps
    finished = np.isfinite(log_loss)
    improvement = _improvement(
        outcome[:, :count],
        np.sqrt(noise[:count] * fresh),
        outcome[:, count + len(tried) :],
        log_loss[finished],
    )
    # What an outcome there would teach: regress optimum and laws on it across the draws.
    sought = np.concatenate([draws.optima, draws.laws.reshape(_DRAWS, -1)], axis=1)
    sought = sought - sought.mean(0)
    outcome = outcome - outcome.mean(0)
    for row in range(count + len(tried), len(points)):
        sought, outcome = _condition(sought, outcome, outcome[:, row].copy(), noise[row])
    covariance = sought.T @ outcome[:, :count] / _DRAWS
    variance = (outcome[:, :count] ** 2).mean(0) + noise[:count] / np.maximum(fresh, 1e-6)
    half = 0.5 * surface.optimum(cell).curvature
    taught = np.einsum("in,ij,jn->n", covariance[:2], half, covariance[:2]) / variance
    # The laws' expected gap, averaged over the cells of the ladder.
    design = surface.design.matrix(surface.cells)
    by_cell = np.einsum("ck,akn->can", design, covariance[2:].reshape(2, -1, count))
    by_law = np.einsum("can,ab,cbn->n", by_cell, half, by_cell) / len(design) / variance
    return improvement + taught + _LAW_WEIGHT * by_law


def _improvement(
    outcome: np.ndarray, sd: np.ndarray, known: np.ndarray, log_loss: np.ndarray
) -> np.ndarray:
    """Expected improvement over the best outcome, in ln loss.

    `outcome` [draws, candidates] are drawn means and `sd` their noise; `known` [draws, n] drawn
    means at the points tried or running; `log_loss` the outcomes seen.
    """
    best = known.min(1) if known.shape[1] else outcome.max(1)
    if len(log_loss):
        best = np.minimum(best, log_loss.min())
    lead = best[:, None] - outcome
    z = lead / np.maximum(sd, 1e-12)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return (lead * ndtr(z) + sd * density).mean(0)


def _alike(candidates: np.ndarray, known: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Correlation of a run's noise at each candidate with that at the nearest known point."""
    if not len(known):
        return np.zeros(len(candidates))
    square = (((candidates[:, None] - known) / length) ** 2).sum(-1).min(1)
    return np.exp(-0.5 * square)


def _condition(
    sought: np.ndarray, outcome: np.ndarray, seen: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink the draws' spread as a noisy observation at `seen` would."""
    variance = float(seen @ seen) / len(seen)
    total = variance + noise
    # The square-root (ensemble) update, whose spread is that of the exact posterior: Whitaker &
    # Hamill 2002.
    gain = 1.0 / (total * (1.0 + np.sqrt(noise / total))) / len(seen)
    return (
        sought - np.outer(seen, (seen @ sought) * gain),
        outcome - np.outer(seen, (seen @ outcome) * gain),
    )
