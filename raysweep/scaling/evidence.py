"""Evidence: everything fitted to the trials that share data, and what it says of any run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from raysweep.scaling.cells import CellTrials
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_loss
from raysweep.scaling.optima.literature import OptimumPrior
from raysweep.scaling.optima.surface import OptimumPosterior, Surface, fit_surface
from raysweep.scaling.runs import size_of
from raysweep.study.shape import RunSize

DRAWS = 400

WITHIN, AT_LEAST = 0.05, 12
"""The surface is fitted to the trials within this share of their cell's best loss, but to at least
so many a cell: far up its walls a valley tells little of its bottom."""

BOTH_SIDES = 0.1
"""An optimum is enclosed if at least this share of the runs lies on either side of it."""

ONE_SD = 0.84
"""The quantile one sd above the median."""

REACH = float(stdtrit(10, 0.975))
"""Half of a 95 % interval of a measured loss, in its standard errors."""

PAIRED = 0.05
"""Cells of two architectures whose ln N and ln D differ by less than this are a pair."""


@dataclass(frozen=True)
class LossAnswer:
    """The expected loss of a run, and what told it: a law's name, `cell` (`edge` where its trials
    do not reach the optimum), or `pairs`."""

    loss: Estimate
    told_by: str
    count: str = ""
    """The column that the law takes as N."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is fitted to one set of data.

    `cells` has one row a cell (index its name), smallest compute first, with `loss` and `loss_se`,
    those of the loss at the optimum (see `_with_losses`), and `loss_unseen`, the part of `loss_se`
    that is common to the cells of an arm whose trials do not reach their optimum. `surface` is None
    where no trial tells both learning rate and batch. `shared_loss` is the law of the loss over all
    architectures, `own_loss` those of single ones where the shared one is not determined.
    """

    dataset: str
    cells: pd.DataFrame
    surface: Surface | None
    shared_loss: LossModel
    own_loss: dict[str, LossModel]

    @cached_property
    def architectures(self) -> list[str]:
        """Their names, dense ones first."""
        kinds = self.cells.groupby("architecture", sort=False)["architecture_kind"].first()
        return sorted(kinds.index, key=lambda name: kinds[name] != "dense")

    @cached_property
    def sizes(self) -> dict[str, RunSize]:
        """The size of each cell's runs."""
        return {str(name): size_of(name, row) for name, row in self.cells.iterrows()}

    @cached_property
    def losses(self) -> dict[str, tuple[float, float]]:
        """The loss of each cell that has one, and its standard error: where repeats do not tell it,
        what one run departs from another (NaN where nothing tells that)."""
        found = {}
        for name, row in self.cells[self.cells["loss"] > 0].iterrows():
            loss, se = float(row["loss"]), float(row["loss_se"])
            known = math.isfinite(se)
            found[str(name)] = loss, se if known else loss * self.noise(row["architecture"])
        return found

    def noise(self, architecture: str) -> float:
        """The sd of ln loss from run to run; NaN where neither a surface nor a law tells it."""
        if self.surface is not None:
            return self.surface.mode.widths.noise
        posterior = self.loss_model(architecture).posterior
        return math.nan if posterior is None else posterior.noise_sd

    def unseen(self, architecture: str, run: RunSize) -> float:
        """The sd of ln loss at a run's optimum because trials do not reach it (see `_with_losses`);
        0 where they enclose it."""
        if run.name in self.losses:
            return float(self.cells["loss_unseen"].to_dict()[run.name])
        return self.loss_model(architecture).unseen

    def optimum(self, run: RunSize) -> OptimumPosterior | None:
        """The posterior of a run's optimum; None where no trial tells its rate and batch."""
        return None if self.surface is None else self.surface.optimum(run)

    def loss_model(self, architecture: str) -> LossModel:
        """The law that tells the loss of an architecture's runs."""
        return self.own_loss.get(architecture, self.shared_loss)

    def loss(self, architecture: str, run: RunSize) -> LossAnswer:
        """The loss of a new run at its optimum.

        Of a measured cell its own; else by the law of the loss; where that is not determined, by a
        determined law of another architecture and the ratio in cells of the same size."""
        return self.loss_of_each(architecture, [run])[0]

    def loss_of_each(self, architecture: str, runs: Sequence[RunSize]) -> list[LossAnswer]:
        """The loss of each of many runs, as `loss` tells it."""
        model = self.loss_model(architecture)
        predicted = np.full((len(runs), 3), math.nan)
        if model.ok and runs:
            predicted = np.stack(model.predict(list(runs)), -1)
        found = []
        for run, ends in zip(runs, predicted, strict=True):
            if run.name in self.losses:
                told_by = "edge" if self.unseen(architecture, run) else "cell"
                found.append(LossAnswer(self._measured(architecture, run.name), told_by))
            elif model.law is not None and math.isfinite(ends[0]):
                factor = math.exp(self.group_offset(run.group))
                loss = Estimate(*(factor * ends).tolist())
                found.append(LossAnswer(loss, model.law.key, model.count))
            else:
                why = Estimate.missing(model.why or "no law of the loss reads this run")
                found.append(self._by_pairs(architecture, run) or LossAnswer(why, ""))
        return found

    def gap(
        self, run: RunSize, learning_rate: np.ndarray, batch_tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ln loss above the optimum's at given settings [n], and its 95 % interval.

        It is the median over where the optimum may be and how steep its walls are."""
        assert self.surface is not None
        point = np.log(np.column_stack(np.broadcast_arrays(learning_rate, batch_tokens)))
        if self.surface.batch_rule is not None:
            point[:, 1] = self.surface.law(run)[1]
        rng = np.random.default_rng(0)
        gaps = self.surface.sample_cell(run, point, DRAWS, rng).gaps
        low, middle, high = np.quantile(gaps, [0.025, 0.5, 0.975], axis=0)
        return middle, low, high

    def sample(
        self, architecture: str, runs: Sequence[RunSize], seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Joint draws of runs: (ln learning rate, ln batch) of the optima [draws, runs, 2], NaN
        without a surface, and ln loss there [draws, runs], NaN where it is not determined."""
        rng = np.random.default_rng(seed)
        optima = np.full((DRAWS, len(runs), 2), np.nan)
        if self.surface is not None:
            optima = self.surface.sample_optima(runs, DRAWS, rng)
        losses = self.loss_model(architecture).sample(list(runs), DRAWS, seed)
        for i, run in enumerate(runs):
            losses[:, i] += self.group_offset(run.group)
            if run.name in self.losses:
                loss, se = self.losses[run.name]
                unseen = self.unseen(architecture, run)
                own = math.sqrt(max((se / loss) ** 2 - unseen**2, 0.0)) if se == se else se
                losses[:, i] = math.log(loss) + own * rng.standard_normal(DRAWS)
                losses[:, i] += unseen * self._common(architecture, run.group)
        return optima, losses

    def _common(self, architecture: str, group: str) -> np.ndarray:
        """Normal draws [draws], the same for all cells of an arm: where trials stop short of the
        optimum, the surface errs alike in all of them."""
        arms = self.cells[["architecture", "group"]].drop_duplicates()
        arms = list(arms.itertuples(index=False, name=None))
        arm = arms.index((architecture, group)) if (architecture, group) in arms else len(arms)
        return np.random.default_rng([1, arm]).standard_normal(DRAWS)

    def pairs(self, one: str, two: str) -> list[tuple[str, str]]:
        """Cells of two architectures with a loss whose active N and D agree."""
        known = self.cells[self.cells["loss"].notna()]
        sizes = np.log(known[["params_active_non_embedding", "tokens"]].to_numpy(float))
        found = []
        of = known["architecture"].to_numpy()
        for i in np.flatnonzero(of == one).tolist():
            off = np.abs(sizes - sizes[i]).max(1)
            off[of != two] = np.inf
            j = int(off.argmin())
            if off[j] < PAIRED:
                found.append((str(known.index[i]), str(known.index[j])))
        return found

    def _measured(self, architecture: str, cell: str) -> Estimate:
        """A new run at a cell's optimum: its level, and what one run departs from another."""
        loss, se = self.losses[cell]
        half = REACH * math.hypot(self.noise(architecture), se / loss)
        return Estimate(loss, loss * math.exp(-half), loss * math.exp(half))

    def _by_pairs(self, architecture: str, run: RunSize) -> LossAnswer | None:
        for other in self.architectures:
            model = self.own_loss.get(other)
            if other == architecture or model is None or not model.ok:
                continue
            pairs = self.pairs(architecture, other)
            if not pairs:
                continue
            loss = self.losses
            ratio = np.array([math.log(loss[a][0] / loss[b][0]) for a, b in pairs])
            # A ratio drifts with size: it is told no better than it varies, and than 1 %.
            spread = max(float(ratio.std()), 0.01)
            value, low, high = (float(v[0]) for v in model.predict([run]))
            if not math.isfinite(value):
                continue
            half = math.hypot(math.log(high / low) / 2, 1.96 * spread)
            middle = value * math.exp(float(ratio.mean()))
            estimate = Estimate(middle, middle * math.exp(-half), middle * math.exp(half))
            return LossAnswer(estimate, "pairs", model.count)
        return None

    def group_offset(self, group: str) -> float:
        """ln loss of a group over the mean of all, other things equal; 0 without several."""
        return 0.0 if self.surface is None else self.surface.group_offset(group)


def gather(
    dataset: str,
    cells: pd.DataFrame,
    trials: Sequence[CellTrials],
    prior: OptimumPrior,
    loss_laws: Sequence[str] | None = None,
) -> Evidence:
    """Fit everything to one set of data: the surface, then the law of the loss at its optima.

    `cells` holds `loss_mean` and `loss_se`, what trials tell without the surface.
    """
    surface = surface_of(trials, prior) if trials else None
    cells = _with_losses(cells, surface, {t.name: t for t in trials})
    data, noise = cells, 0.0
    if surface is not None:
        offset = cells["group"].map(surface.group_offset).astype(float)
        data = cells.assign(loss=cells["loss"] * np.exp(-offset))
        noise = surface.mode.widths.noise
    shared = _law_of(data, noise, loss_laws)
    names = list(dict.fromkeys(cells["architecture"]))
    own = {}
    if not shared.ok and len(names) > 1:
        for name in names:
            own[name] = _law_of(data[data["architecture"] == name], noise, loss_laws)
    return Evidence(dataset, cells, surface, shared, own)


def _law_of(cells: pd.DataFrame, noise: float, loss_laws: Sequence[str] | None) -> LossModel:
    """The law of the loss through cells. What their trials leave unseen is common to them as far as
    they share it, by weight; the rest adds to each one's error."""
    unseen = cells["loss_unseen"].to_numpy(float)
    variance = (cells["loss_se"] / cells["loss"]).to_numpy(float) ** 2
    common = 0.0
    if unseen.any():
        weight = np.nan_to_num(1 / (variance + noise**2))
        common = float((weight * unseen).sum() / weight.sum())
        variance = np.maximum(variance - unseen**2, 0.0) + (unseen - common) ** 2
        cells = cells.assign(loss_se=cells["loss"] * np.sqrt(variance))
    return replace(choose_loss(LossData.from_cells(cells), loss_laws), unseen=common)


def surface_of(trials: Sequence[CellTrials], prior: OptimumPrior) -> Surface:
    """The model of cells, fitted to the trials near each cell's bottom and to the diverged."""
    near = [_near_bottom(t) for t in trials]
    lost = [np.full_like(t.failed_learning_rate, np.nan) for t in trials]
    both = list(zip(trials, near, lost, strict=True))
    return fit_surface(
        [t.size for t in trials],
        np.repeat(np.arange(len(trials)), [int(n.sum()) + len(x) for _, n, x in both]),
        np.concatenate([np.r_[t.learning_rate[n], t.failed_learning_rate] for t, n, _ in both]),
        np.concatenate([np.r_[t.batch_tokens[n], t.failed_batch_tokens] for t, n, _ in both]),
        np.concatenate([np.r_[t.loss[n], x] for t, n, x in both]),
        prior=prior,
    )


def _near_bottom(trials: CellTrials) -> np.ndarray:
    """[n] bool: the trials near the bottom of their cell."""
    enough = np.sort(trials.loss)[:AT_LEAST][-1]
    return trials.loss <= max(enough, trials.loss.min() * (1 + WITHIN))


def _with_losses(
    cells: pd.DataFrame, surface: Surface | None, trials: Mapping[str, CellTrials]
) -> pd.DataFrame:
    """The cell table with `loss`, `loss_se` and `loss_unseen` of the optimum, and `loss_from`:

    - `optimum`: the surface's, where the cell's trials enclose it;
    - `surface`: the surface's, where those of all cells like it do, each seen from its cell's
      optimum: runs of ragged tokens have a cell each;
    - `edge`: half way, in logs, between the best run's and the surface's, with half of the distance
      as `loss_unseen`: there the surface only guesses how far the valley falls beyond the trials.
      Where no learning rate was varied it is the published laws that guess, with all their width;
    - `trials`: of the best setting, where there is no surface; `none`: no loss.
    """
    loss, se, unseen, told = [], [], [], []
    around = {} if surface is None else _enclosed(surface)
    for name, row in cells.iterrows():
        value, error, by = float(row["loss_mean"]), float(row["loss_se"]), "trials"
        shift = hidden = 0.0
        if surface is not None and name in trials:
            posterior = surface.optimum(str(name))
            if _encloses(trials[str(name)], posterior, surface.batch_rule is not None):
                by = "optimum"
            elif around[str(name)]:
                by = "surface"
            else:
                by = "edge"
                shift = max(math.log(value) - posterior.log_loss, 0.0) / 2
                hidden = math.hypot(shift, _below(surface, trials[str(name)]))
            value = posterior.loss * math.exp(shift)
            error = value * math.hypot(posterior.log_loss_sd, hidden)
        if not math.isfinite(value):
            by = "none"
        loss.append(value)
        se.append(error)
        unseen.append(hidden)
        told.append(by)
    return cells.assign(loss=loss, loss_se=se, loss_unseen=unseen, loss_from=told)


def _below(surface: Surface, trials: CellTrials) -> float:
    """By how much, as an sd of ln loss, the optimum may lie below the best of trials that never
    varied their learning rate, 0 where they did: such that the interval reaches a drop of one sd.
    (The drop is skewed: its 97.5 % quantile rests on walls that no trial has seen.)"""
    if surface.varied[0]:
        return 0.0
    best = int(trials.loss.argmin())
    point = np.log([[trials.learning_rate[best], trials.batch_tokens[best]]])
    gaps = surface.sample_cell(trials.name, point, DRAWS, np.random.default_rng(0)).gaps
    return float(np.quantile(gaps, ONE_SD)) / 2


def _encloses(trials: CellTrials, optimum: OptimumPosterior, one_batch: bool) -> bool:
    """Whether a cell's trials lie on both sides of its optimum, in all that was searched."""
    rate = np.log(np.r_[trials.learning_rate, trials.failed_learning_rate])
    batch = np.log(trials.batch_tokens)
    inside = rate.min() <= optimum.mean[0] <= rate.max()
    if one_batch:
        return bool(inside)
    return bool(inside and batch.min() <= optimum.mean[1] <= batch.max())


def _enclosed(surface: Surface) -> dict[str, bool]:
    """By cell, whether the runs of all cells of its routing and group lie on all sides of the
    optimum, each seen from that of its own cell."""
    axes = slice(1) if surface.batch_rule is not None else slice(2)
    varied = all(surface.varied[axes])
    optima = np.array([surface.optimum(cell).mean for cell in surface.cells])
    off = (surface.observed.point - optima[surface.observed.cell])[:, axes]
    kinds = [(cell.experts, cell.top_k, cell.group) for cell in surface.cells]
    found = {}
    for kind in dict.fromkeys(kinds):
        own = off[[kinds[c] == kind for c in surface.observed.cell]]
        share = np.minimum((own < 0).mean(0), (own > 0).mean(0)) if len(own) else np.zeros(1)
        found[kind] = varied and bool((share >= BOTH_SIDES).all())
    return {cell.name: found[kind] for cell, kind in zip(surface.cells, kinds, strict=True)}
