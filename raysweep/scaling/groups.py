"""A group of cells, one architecture or all of them, and everything that is fitted to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.scaling.cells import CellTable, CellTrials, routings
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.selection import (
    ONE_ROUTING_LAWS,
    ROUTING_LAWS,
    LossCheck,
    NotFitted,
    batch_table,
    check_loss_laws,
    fit_loss_law,
    fit_loss_laws,
)
from raysweep.scaling.noise import CriticalBatch, fit_critical_batch, fit_noise_scale
from raysweep.scaling.optima_laws import (
    KNOWN_AHEAD,
    CountComparison,
    LossGap,
    best_law,
    compare_counts,
    fit_laws,
    held_out_gap,
    loss_gap,
)
from raysweep.scaling.optimum import OPTIMUM_METHODS, Optimum
from raysweep.scaling.power_law import PowerLaw

ALL = "(all)"
"""The group of all architectures together."""


@dataclass(frozen=True)
class MethodCheck:
    """How one way of reading optima compares with the default one, over the cells both can read."""

    method: str
    n_interior: int
    learning_rate: float
    """Median |ln(learning rate / the default's)|; NaN without a common cell."""
    batch_tokens: float
    laws: dict[str, PowerLaw]

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "method": self.method,
            "n_interior": self.n_interior,
            "median_log_difference_learning_rate": self.learning_rate,
            "median_log_difference_batch": self.batch_tokens,
            "laws": {
                name: {
                    "status": law.status,
                    "formula": law.formula,
                    "exponents": {k: e.to_dict() for k, e in law.exponents.items()},
                    "held_out_log_error": law.held_out,
                }
                for name, law in self.laws.items()
            },
        }


@dataclass(frozen=True, eq=False)
class Group:
    """All that is fitted to the cells of one architecture, or to all architectures together.

    `laws` are the laws of the optima by name, `loss_laws` those of the loss by key; both hold
    entries that could not be fitted, with status and message. `loss_checks` tell how those of the
    loss predict the highest level of compute from those below. `count` is the column taken as N.
    """

    name: str
    kind: str
    cells: pd.DataFrame
    laws: dict[str, PowerLaw]
    loss_laws: dict[str, LossFit | NotFitted]
    loss_checks: dict[str, LossCheck]
    counts: CountComparison
    in_sample: LossGap | None
    held_out: LossGap | None
    critical_batch: CriticalBatch
    noise_scale: CriticalBatch
    methods: dict[str, MethodCheck]

    @property
    def count(self) -> str:
        return self.counts.chosen

    @property
    def mixes_experts(self) -> bool:
        """Whether its cells differ in routing, so that a law of the loss must read experts."""
        return routings(self.cells) > 1

    @property
    def wants_routing(self) -> bool:
        """Whether a law of the optima must read the routing to tell of a run."""
        return self.name == ALL or self.mixes_experts

    def best_law(self, target: str) -> PowerLaw | None:
        """The law of `learning_rate` or `batch_tokens` that predicts unseen cells best, or None."""
        return best_law(self.laws, target, KNOWN_AHEAD)

    def loss_order(self) -> list[str]:
        """The fitted laws of the loss, the one that best predicts the highest compute first.

        A law that could not be so tried comes after those that could, in the order of fitting."""
        usable = [key for key in self.loss_checks if self.loss_laws[key].ok]

        def error(key: str) -> float:
            found = self.loss_checks[key].error
            return found if math.isfinite(found) else math.inf

        return sorted(usable, key=error)

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        chosen = {t: self.best_law(t) for t in ("learning_rate", "batch_tokens")}
        return {
            "name": self.name,
            "kind": self.kind,
            "cells": list(self.cells.index),
            "laws": dict(self.laws),
            "best_law": {t: law.name if law else None for t, law in chosen.items()},
            "loss_laws": dict(self.loss_laws),
            "loss_checks": dict(self.loss_checks),
            "counts": self.counts,
            "in_sample": self.in_sample,
            "held_out": self.held_out,
            "critical_batch": self.critical_batch,
            "noise_scale": self.noise_scale,
            "methods": dict(self.methods),
        }


@dataclass(frozen=True)
class Sources:
    """What every group is fitted from."""

    table: CellTable
    trials: list[CellTrials]
    optima: dict[str, dict[str, Optimum]]
    noise: pd.DataFrame
    method: str
    n_boot: int
    seed: int


def fit_group(name: str, cells: pd.DataFrame, data: Sources, loss_law: str | None) -> Group:
    """Fit a group: the rows of `cells` with what `data` holds of them."""
    optima = data.optima[data.method]
    counts = compare_counts(cells, optima)
    count = counts.chosen
    laws = fit_laws(cells, optima, count=count, n_boot=data.n_boot, seed=data.seed)
    trials = [t for t in data.trials if t.name in cells.index]
    rate = best_law(laws, "learning_rate", KNOWN_AHEAD)
    batch = best_law(laws, "batch_tokens", KNOWN_AHEAD)
    in_sample = None
    if rate is not None and batch is not None:
        in_sample = loss_gap(rate, batch, cells, trials, optima, count)
    kinds = set(cells["architecture_kind"])
    if len(kinds) == 1:
        losses = fit_loss_laws(cells, ONE_ROUTING_LAWS, n_boot=data.n_boot, seed=data.seed)
        own = data.table.trials[data.table.trials["cell"].isin(cells.index)]
        losses["three_term"] = fit_loss_law(
            batch_table(cells, own), "three_term", n_boot=data.n_boot, seed=data.seed
        )
    else:
        losses = {}
    if routings(cells) > 1:
        losses |= fit_loss_laws(cells, ROUTING_LAWS, n_boot=data.n_boot, seed=data.seed)
    if loss_law is not None and loss_law not in losses:
        losses[loss_law] = fit_loss_law(cells, loss_law, n_boot=data.n_boot, seed=data.seed)
    return Group(
        name=name,
        kind=kinds.pop() if len(kinds) == 1 else "mixed",
        cells=cells,
        laws=laws,
        loss_laws=losses,
        loss_checks=check_loss_laws(
            {k: f for k, f in losses.items() if k != "three_term"},  # fitted on batches, not cells
            cells,
            n_boot=min(data.n_boot, 100),
            seed=data.seed,
        ),
        counts=counts,
        in_sample=in_sample,
        held_out=held_out_gap(cells, trials, optima, count=count, method=data.method),
        critical_batch=fit_critical_batch(cells, optima, n_boot=data.n_boot, seed=data.seed),
        noise_scale=fit_noise_scale(
            cells, data.noise.loc[cells.index], n_boot=data.n_boot, seed=data.seed
        ),
        methods={m: _check_method(m, cells, data, count) for m in OPTIMUM_METHODS},
    )


def _check_method(method: str, cells: pd.DataFrame, data: Sources, count: str) -> MethodCheck:
    default, other = data.optima[data.method], data.optima[method]
    pairs = [
        (default[n], other[n])
        for n in cells.index
        if n in default and default[n].interior and other[n].interior
    ]
    rate = [abs(math.log(b.learning_rate / a.learning_rate)) for a, b in pairs]
    batch = [abs(math.log(b.batch_tokens / a.batch_tokens)) for a, b in pairs]
    return MethodCheck(
        method=method,
        n_interior=sum(n in other and other[n].interior for n in cells.index),
        learning_rate=float(np.median(rate)) if rate else math.nan,
        batch_tokens=float(np.median(batch)) if batch else math.nan,
        laws=fit_laws(cells, other, count=count, n_boot=min(data.n_boot, 50), seed=data.seed),
    )
