"""fit(results) -> Fits: optima, their laws, the laws of the loss, and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas as pd

from raysweep.display import InNotebooks
from raysweep.errors import UserError
from raysweep.scaling.advise import advise
from raysweep.scaling.cells import CellTable, CellTrials, cell_table
from raysweep.scaling.compute.allocation import Allocation
from raysweep.scaling.compute.budgets import (
    Saving,
    Split,
    best_splits,
    savings,
    split_budget,
    usable_experts_law,
)
from raysweep.scaling.compute.serving import Serving, Solution, serving_solutions
from raysweep.scaling.expert_load import cell_expert_load
from raysweep.scaling.groups import ALL, Group, Sources, fit_group
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_loss
from raysweep.scaling.noise import Ratio, cell_noise_scale, compare_kinds
from raysweep.scaling.optimum import (
    OPTIMUM_METHODS,
    Optimum,
    find_optima,
    surface_of,
    surface_optima,
)
from raysweep.scaling.plain import plain
from raysweep.scaling.recommend import Recommendation
from raysweep.scaling.sensitivity import Sensitivity, group_sensitivity
from raysweep.scaling.summary import summary
from raysweep.scaling.surface import Surface

__all__ = ["ALL", "Fits", "Group", "Recommendation", "fit"]


class HasFrame(Protocol):
    """Anything with the results table, such as `raysweep.results.store.Results`."""

    def frame(self) -> pd.DataFrame:
        """One row a trial, columns of `results.schema`."""
        ...


@dataclass(frozen=True, eq=False)
class Fits(InNotebooks):
    """All fits of one results table.

    `cells` has one row a cell (index its name), smallest compute first, with `loss` (at the
    optimum where that is interior, else the best trial's; `loss_from` says which), `loss_se`, and
    the default method's `learning_rate`, `batch_tokens`, `status`. `optima[method][cell]` are the
    optima by every method. `groups` are the architectures by name, and `ALL` where there are
    several; `loss_models` the answer about the loss of each. `comparison` holds MoE over dense, `at
    equal loss` and `at equal N and D`; empty without both. `allocation` tells how each architecture
    best splits a budget, `efficiency` what each MoE architecture saves over dense (empty without
    both). `expert_load` is that of the MoE cells that measured it,
    `sensitivity[architecture][target]` how a law depends on choices.
    """

    method: str
    cells: pd.DataFrame
    left_out: dict[str, int]
    n_rows: int
    optima: dict[str, dict[str, Optimum]]
    groups: dict[str, Group]
    comparison: dict[str, dict[str, Ratio]]
    allocation: dict[str, Split]
    efficiency: dict[str, Saving]
    noise_scale: pd.DataFrame
    expert_load: pd.DataFrame
    sensitivity: dict[str, dict[str, Sensitivity]]
    surface: Surface | None
    loss_law: str | None
    messages: tuple[str, ...]
    loss_models: dict[str, LossModel] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: what `raysweep fit --json` prints."""
        result = plain(
            {
                "method": self.method,
                "methods": {m.name: m.summary for m in OPTIMUM_METHODS.values()},
                "n_rows": self.n_rows,
                "left_out": self.left_out,
                "cells": self.cells,
                "optima": self.optima,
                "groups": self.groups,
                "loss_models": self.loss_models,
                "comparison": self.comparison,
                "allocation": self.allocation,
                "efficiency": self.efficiency,
                "noise_scale": self.noise_scale,
                "expert_load": self.expert_load,
                "sensitivity": self.sensitivity,
                "messages": self.messages,
            }
        )
        assert isinstance(result, dict)
        return result

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return summary(self)

    def recommend(
        self,
        architecture: str | None = None,
        params: float = math.nan,
        tokens: float = math.nan,
        experts: int | None = None,
        top_k: int | None = None,
    ) -> Recommendation:
        """What to run for `params` active non-embedding parameters on `tokens` tokens.

        `architecture` is a name in the results, or `dense` or `moe`; without one, `experts`
        decides. Raises UserError for what no results could answer; what these cannot answer is a
        status.
        """
        return advise(self, architecture, params, tokens, experts, top_k)

    def split(self, flops: float | Sequence[float]) -> dict[str, list[Allocation]]:
        """How each architecture best splits each of some training budgets (FLOPs) between
        parameters and tokens, with 95 % intervals; a word in place of what is not determined.

        Raises UserError for a budget that is not positive."""
        budgets = [float(c) for c in np.atleast_1d(np.asarray(flops, dtype=float))]
        return {
            name: best_splits(model, budgets)
            for name, model in self.loss_models.items()
            if name != ALL
        }

    def serve(
        self,
        flops: float,
        serving: Serving,
        experts: Sequence[float] = (2, 4, 8, 16, 32, 64),
        reference: float | None = None,
    ) -> list[Solution]:
        """What a training budget buys with each number of experts, at equal quality and at equal
        serving cost; see `serving.serving_solutions`.

        Raises UserError where no law over several numbers of experts was fitted."""
        return serving_solutions(
            usable_experts_law(self.groups), flops, serving, experts, reference
        )


def fit(
    results: pd.DataFrame | HasFrame,
    *,
    loss_law: str | None = None,
    optimum_method: str = "surface",
    n_boot: int = 200,
    seed: int = 0,
) -> Fits:
    """Fit everything that a results table can tell.

    `loss_law` names a law to fit beside the usual ones and to predict losses with; `n_boot` is the
    number of resamples behind every interval. What cannot be fitted has a status and a message.
    Raises UserError for an unknown method or law, or a table without the columns every fit needs.
    """
    if optimum_method not in OPTIMUM_METHODS:
        known = ", ".join(OPTIMUM_METHODS)
        raise UserError(f"unknown optimum method {optimum_method!r}; known: {known}")
    frame = results if isinstance(results, pd.DataFrame) else results.frame()
    table = cell_table(frame)
    trials = table.searched()
    surface = surface_of(trials) if trials else None
    optima: dict[str, dict[str, Optimum]] = {}
    for method in OPTIMUM_METHODS:
        if method == "surface" and surface is not None:
            found = surface_optima(surface, trials)
        else:
            found = find_optima(trials, method)
        optima[method] = {o.cell: o for o in found}
    cells = _with_optima(table.cells, optima[optimum_method])
    noise = cell_noise_scale(cells, table.trials)
    data = Sources(table, trials, optima, noise, optimum_method, n_boot, seed)
    names = list(dict.fromkeys(cells["architecture"]))
    kinds = set(cells["architecture_kind"])
    groups = {
        name: fit_group(name, cells[cells["architecture"] == name], data, loss_law)
        for name in names
    }
    if len(names) > 1:
        groups[ALL] = fit_group(ALL, cells, data, loss_law)
    models = {name: choose_loss(LossData.from_cells(g.cells)) for name, g in groups.items()}
    comparison = {}
    if {"dense", "moe"} <= kinds:
        default = optima[optimum_method]
        for label, at_equal in (
            ("at equal loss", ("loss",)),
            ("at equal N and D", ("params", "tokens")),
            ("at equal FLOPs", ("flops",)),
        ):
            comparison[label] = compare_kinds(
                cells, default, noise, at_equal=at_equal, n_boot=n_boot, seed=seed
            )
    left_out = table.left_out["why"].value_counts()
    return Fits(
        method=optimum_method,
        cells=cells,
        left_out={str(k): int(v) for k, v in left_out.items()},
        n_rows=len(frame),
        optima=optima,
        groups=groups,
        comparison=comparison,
        allocation={
            name: split_budget(model, n_boot, seed) for name, model in models.items() if name != ALL
        },
        efficiency=savings(groups, models),
        noise_scale=noise,
        expert_load=cell_expert_load(cells, table.trials),
        sensitivity={
            name: group_sensitivity(group, optima, optimum_method, seed)
            for name, group in groups.items()
            if name != ALL
        },
        surface=surface,
        loss_law=loss_law,
        messages=tuple(_messages(table, trials, optima[optimum_method])),
        loss_models=models,
    )


def _with_optima(cells: pd.DataFrame, optima: Mapping[str, Optimum]) -> pd.DataFrame:
    """The cell table with each cell's optimum, and the loss that stands for the cell."""
    found = [optima.get(name) for name in cells.index]
    interior = np.array([o is not None and o.interior for o in found], dtype=bool)
    fitted = np.array([o.loss if o else math.nan for o in found], dtype=float)
    se = np.array([o.loss_se if o else math.nan for o in found], dtype=float)
    # Runs that tell no learning rate or batch are repeats: their mean counts, not the luckiest.
    repeats = cells["n_searched"].to_numpy(int) == 0
    best = np.where(repeats, cells["mean_loss"], cells["best_loss"]).astype(float)
    word = np.where(repeats, "mean of runs", "best trial")
    return cells.assign(
        loss=np.where(interior, fitted, best),
        loss_from=np.where(interior, "optimum", np.where(np.isnan(best), "none", word)),
        loss_se=np.where(interior, se, np.where(repeats, best * _repeat_se(cells), np.nan)),
        learning_rate=[o.learning_rate if o else math.nan for o in found],
        batch_tokens=[o.batch_tokens if o else math.nan for o in found],
        status=[o.status if o else "no learning rate or batch" for o in found],
    )


def _repeat_se(cells: pd.DataFrame) -> np.ndarray:
    """sd of each cell's mean ln loss, by the spread within all repeated cells; NaN without any."""
    n, sd = cells["n_finished"].to_numpy(float), cells["loss_sd"].to_numpy(float)
    freedom = np.where((cells["n_searched"] == 0) & np.isfinite(sd), n - 1, 0.0)
    if not freedom.sum():
        return np.full(len(cells), np.nan)
    pooled = np.sqrt((freedom * np.nan_to_num(sd) ** 2).sum() / freedom.sum())
    return pooled / np.sqrt(np.maximum(n, 1))


def _messages(
    table: CellTable, trials: Sequence[CellTrials], optima: Mapping[str, Optimum]
) -> list[str]:
    """What a reader must know before any number: in whole sentences."""
    said = []
    if not len(table.trials):
        said.append("no finished trial with a loss counts: nothing can be fitted")
    elif not trials:
        said.append("no trial tells its learning rate and batch: only laws of the loss are fitted")
    statuses = pd.Series([o.status for o in optima.values()], dtype=object).value_counts()
    outside = {str(k): int(v) for k, v in statuses.items() if k != "interior"}
    if outside:
        listed = ", ".join(f"{v} {k}" for k, v in outside.items())
        said.append(
            f"{len(optima) - sum(outside.values())} of {len(optima)} optima are interior; the laws "
            f"of the optima leave out the others ({listed})"
        )
    return said
