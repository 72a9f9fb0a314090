"""Laws of the optima of a group of cells: which are fitted, with which N, and how they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.scaling.cells import COUNTS, CellTrials, routings
from raysweep.scaling.optimum import Optimum, find_optima
from raysweep.scaling.power_law import PowerLaw, fit_power_law

LAWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("learning_rate", ("params", "tokens")),
    ("learning_rate", ("flops",)),
    ("learning_rate", ("loss",)),
    ("batch_tokens", ("params", "tokens")),
    ("batch_tokens", ("tokens",)),
    ("batch_tokens", ("flops",)),
    ("batch_tokens", ("loss",)),
)
"""Target and inputs of every law of the optima; a group of several architectures or numbers of
experts adds `EXTRAS`."""

EXTRAS: tuple[tuple[str, ...], ...] = ((), ("active_ratio",), ("experts",), ("experts", "top_k"))
"""Further powers that may set MoE apart from dense cells."""

KNOWN_AHEAD = ("params", "tokens", "flops", "active_ratio", "experts", "top_k")
"""Inputs that are known before a run, so that a law in them can recommend."""

TRAIN_SHARE = 0.6
"""Share of cells, smallest compute first, that a held-out check is fitted on."""

NEAR = 0.5
"""A recorded trial this close (ln units) to a prediction may stand for it in a loss gap."""


@dataclass(frozen=True)
class LossGap:
    """What it costs to follow a pair of laws: recorded loss nearest to their prediction over the
    best.

    Gaps are relative (0.001 is 0.1 %). Cells without a trial within `NEAR` of the prediction are in
    `unmeasured`. `log_error_*` is the mean |ln(predicted / optimum)|.
    """

    gaps: dict[str, float]
    unmeasured: tuple[str, ...]
    log_error_learning_rate: float
    log_error_batch: float
    n_train: int
    predicted: dict[str, dict[str, tuple[float, float, float]]]
    """cell -> target -> (value, low, high) of its optimum by the laws; 95 %."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.gaps.values()))) if self.gaps else math.nan

    @property
    def max(self) -> float:
        return max(self.gaps.values(), default=math.nan)

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "mean_gap": self.mean,
            "max_gap": self.max,
            "gaps": dict(self.gaps),
            "unmeasured": list(self.unmeasured),
            "log_error_learning_rate": self.log_error_learning_rate,
            "log_error_batch": self.log_error_batch,
            "n_train": self.n_train,
            "n_test": len(self.gaps) + len(self.unmeasured),
            "predicted": self.predicted,
        }


def law_inputs(cells: pd.DataFrame, count: str) -> dict[str, np.ndarray]:
    """The inputs of laws of optima for each row of a cell table, with `count` as N."""
    loss = cells["loss"] if "loss" in cells else cells["best_loss"]
    return {
        "params": cells[count].to_numpy(float),
        "tokens": cells["tokens"].to_numpy(float),
        "flops": cells["flops"].to_numpy(float),
        "loss": loss.to_numpy(float),
        "experts": cells["experts"].to_numpy(float),
        "top_k": cells["top_k"].to_numpy(float),
        "active_ratio": cells["active_ratio"].to_numpy(float),
    }


def fit_law(
    target: str,
    inputs: Sequence[str],
    cells: pd.DataFrame,
    optima: Mapping[str, Optimum],
    *,
    count: str = COUNTS[0],
    extra: Mapping[str, np.ndarray] | None = None,
    n_boot: int = 200,
    seed: int = 0,
) -> PowerLaw:
    """One law over the rows of a cell table. Only interior optima count; others are named, with
    why.

    `extra` adds inputs of one value a row.
    """
    columns = {**law_inputs(cells, count), **(extra or {})}
    found = [optima.get(name) for name in cells.index]
    keep = np.array([o is not None and o.interior for o in found], dtype=bool)
    left_out = {
        str(name): o.status if o is not None else "no trial with a learning rate and a batch"
        for name, o, k in zip(cells.index, found, keep, strict=True)
        if not k
    }
    axis = 0 if target == "learning_rate" else 1
    used = [o for o, k in zip(found, keep, strict=True) if k and o is not None]
    return fit_power_law(
        target,
        {name: columns[name][keep] for name in inputs},
        np.array([math.exp(o.own[axis]) for o in used]),
        np.array([math.sqrt(o.own_covariance[axis, axis]) for o in used]),
        cells=[str(c) for c in cells.index[keep]],
        left_out=left_out,
        families=cells["architecture"].to_numpy()[keep].astype(str),
        count=count if "params" in inputs else "",
        n_boot=n_boot,
        seed=seed,
    )


def fit_laws(
    cells: pd.DataFrame,
    optima: Mapping[str, Optimum],
    *,
    count: str = COUNTS[0],
    n_boot: int = 200,
    seed: int = 0,
) -> dict[str, PowerLaw]:
    """All laws of `LAWS` over the rows of a cell table, by name.

    Where the rows mix architectures or numbers of experts, each law also comes with every set of
    `EXTRAS` that varies.
    """
    mixed = cells["architecture"].nunique() > 1 or routings(cells) > 1
    varying = {e for e in ("active_ratio", "experts", "top_k") if cells[e].nunique() > 1}
    laws = {}
    for target, inputs in LAWS:
        for extra in EXTRAS if mixed else ((),):
            if not set(extra) <= varying:
                continue
            law = fit_law(
                target, (*inputs, *extra), cells, optima, count=count, n_boot=n_boot, seed=seed
            )
            laws[law.name] = law
    return laws


def best_law(laws: Mapping[str, PowerLaw], target: str, known: Sequence[str]) -> PowerLaw | None:
    """The law of a target that predicted unseen cells best, among those in the inputs `known`.

    Laws that could not be left-one-out come after the others, more inputs first. None where there
    is no fitted law.
    """
    usable = [
        law
        for law in laws.values()
        if law.ok and law.target == target and set(law.inputs) <= set(known)
    ]
    unknown = 1e9
    return min(
        usable,
        key=lambda law: (
            round(law.held_out, 3) if math.isfinite(law.held_out) else unknown,
            "experts" in law.inputs,  # a ratio extrapolates; a number of experts seldom varies
            -len(law.inputs),
        ),
        default=None,
    )


@dataclass(frozen=True)
class CountComparison:
    """Which parameter count serves best as N: mean |ln error| on cells left out, by count."""

    errors: dict[str, dict[str, float]]
    """target -> count -> error; NaN where the law could not be fitted or the count is not known."""
    chosen: str
    message: str

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {"errors": self.errors, "chosen": self.chosen, "message": self.message}


def compare_counts(cells: pd.DataFrame, optima: Mapping[str, Optimum]) -> CountComparison:
    """Fit learning rate and batch on (N, D) with each parameter count as N; the least error wins.

    No further powers are used: the question is which count makes dense and MoE cells one family.
    """
    errors: dict[str, dict[str, float]] = {}
    for target in ("learning_rate", "batch_tokens"):
        errors[target] = {}
        for count in COUNTS:
            complete = cells[count].notna().all() and len(cells) > 0
            law = (
                fit_law(target, ("params", "tokens"), cells, optima, count=count, n_boot=20)
                if complete
                else None
            )
            errors[target][count] = law.held_out if law is not None else math.nan
    total = {
        count: sum(errors[target][count] for target in errors)
        for count in COUNTS
        if all(math.isfinite(errors[target][count]) for target in errors)
    }
    if not total:
        return CountComparison(
            errors, COUNTS[0], f"no count could be checked on unseen cells: {COUNTS[0]} is used"
        )
    chosen = min(total, key=lambda c: (round(total[c], 6), COUNTS.index(c)))
    listed = ", ".join(
        f"{c} {100 * errors['learning_rate'][c]:.1f} % / {100 * errors['batch_tokens'][c]:.1f} %"
        for c in sorted(total, key=lambda c: total[c])
    )
    return CountComparison(
        errors,
        chosen,
        f"{chosen} predicts unseen cells best (mean error in learning rate / batch: {listed})",
    )


def loss_gap(
    learning_rate: PowerLaw,
    batch: PowerLaw,
    cells: pd.DataFrame,
    trials: Sequence[CellTrials],
    optima: Mapping[str, Optimum],
    count: str,
) -> LossGap:
    """What following two laws costs on recorded trials of the given cells.

    The recorded trial nearest to the prediction in (ln learning rate, ln batch) stands for it.
    """
    inputs = law_inputs(cells, count)
    rates = np.log(learning_rate.predict(inputs))
    batches = np.log(batch.predict(inputs))
    ends = {law.target: law.interval(inputs) for law in (learning_rate, batch)}
    middles = {"learning_rate": np.exp(rates), "batch_tokens": np.exp(batches)}
    at = {name: k for k, name in enumerate(cells.index)}
    gaps: dict[str, float] = {}
    unmeasured = []
    errors = []
    for t in trials:
        k = at[t.name]
        distance = np.hypot(np.log(t.learning_rate) - rates[k], np.log(t.batch_tokens) - batches[k])
        nearest = int(distance.argmin())
        if distance[nearest] <= NEAR:
            gaps[t.name] = float(t.loss[nearest] / t.loss.min() - 1)
        else:
            unmeasured.append(t.name)
        optimum = optima[t.name]
        errors.append(
            (
                abs(rates[k] - math.log(optimum.learning_rate)),
                abs(batches[k] - math.log(optimum.batch_tokens)),
            )
        )
    mean = np.mean(errors, axis=0) if errors else (math.nan, math.nan)
    predicted = {
        t.name: {
            target: (float(middles[target][k]), float(low[k]), float(high[k]))
            for target, (low, high) in ends.items()
        }
        for t in trials
        for k in (at[t.name],)
    }
    return LossGap(
        gaps,
        tuple(unmeasured),
        float(mean[0]),
        float(mean[1]),
        learning_rate.n_cells,
        predicted,
    )


def held_out_gap(
    cells: pd.DataFrame,
    trials: Sequence[CellTrials],
    optima: Mapping[str, Optimum],
    *,
    count: str,
    method: str,
    n_train: int | None = None,
) -> LossGap | None:
    """Laws from the `n_train` smallest-compute cells alone: their cost on all the others.

    Optima, laws and the choice of the law's form see the training cells only. None where the cells
    are too few for that.
    """
    by_name = {t.name: t for t in trials}
    order = [name for name in cells.index if name in by_name]
    n_train = math.ceil(TRAIN_SHARE * len(order)) if n_train is None else n_train
    small, large = order[:n_train], order[n_train:]
    if not small or not large:
        return None
    seen = {o.cell: o for o in find_optima([by_name[n] for n in small], method)}
    fitted = fit_laws(cells.loc[small], seen, count=count, n_boot=50)
    rate = best_law(fitted, "learning_rate", KNOWN_AHEAD)
    batch = best_law(fitted, "batch_tokens", KNOWN_AHEAD)
    if rate is None or batch is None:
        return None
    return loss_gap(rate, batch, cells.loc[large], [by_name[n] for n in large], optima, count)
