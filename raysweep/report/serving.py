"""What it costs to serve: the six figures of Yun et al. 2024 (arXiv 2404.02852) for a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysweep.errors import UserError
from raysweep.report.answers import Answer
from raysweep.report.figure import (
    Axis,
    Line,
    Look,
    Panel,
    PlotFigure,
    Points,
    Series,
    cell_points,
    looks,
)
from raysweep.report.laws import MAX_ARCHITECTURES
from raysweep.scaling.compute.allocation import COUNT_NAMES
from raysweep.scaling.compute.serving import (
    KINDS,
    CandidateCurves,
    Kind,
    Serving,
    ServingLaw,
    Solution,
)
from raysweep.scaling.compute.serving_words import COLUMNS, assumptions, marks
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import QUANTITIES
from raysweep.study.serving import ServingSettings
from raysweep.text import dollars, scientific, short

SMALLEST = 1e7
"""Below so many parameters a GPU's roofline says nothing of what a model costs to serve."""

OVER = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Budgets that figures go over where the study names one at most: times that of the largest run
asked about."""

WINDOW, CURVE = 30.0, 41
"""Sizes that a figure shows to either side of the best; points of a curve."""

PANELS = 4
"""Sizes at which loss is drawn against tokens, at most."""

COST = Axis("dollars a million generated tokens", "rate")
LOSS = Axis.of("loss", log=False)
SIZE = Axis("N of the dense model", "params")
BUDGET = Axis.of("flops")


@dataclass(frozen=True)
class Served:
    """What training budgets buy with each architecture; `why` says where nothing."""

    law: ServingLaw | None = None
    budget: float = math.nan
    """That of the tables and of what is drawn at one budget."""
    solutions: tuple[Solution, ...] = ()
    why: str = ""

    def of(self, kind: Kind, name: str) -> list[Solution]:
        """Those of one kind and architecture that were found and can be served, by budget."""
        return [
            s
            for s in self.solutions
            if (s.kind, s.name, s.status) == (kind, name, "found") and s.cost.status == "fits"
        ]

    @property
    def names(self) -> list[str]:
        """The architectures that figures show."""
        return list(self.law.candidates)[:MAX_ARCHITECTURES] if self.law else []


def serve(fits: Fits, settings: ServingSettings, answers: Sequence[Answer]) -> Served:
    """At the study's budgets, or about the compute of the largest run asked about."""
    if not any(fits.kind(name) == "moe" for name in fits.architectures):
        return Served()
    asked = [a.run.run.compute for a in answers]
    if not (settings.budgets or asked):
        return Served()
    middle = float(f"{max(asked, default=math.nan):.3g}")
    budgets = sorted(settings.budgets)
    if len(budgets) < 2:
        middle = budgets[0] if budgets else middle
        budgets = [middle * factor for factor in OVER]
    else:
        middle = budgets[len(budgets) // 2]
    try:
        law = fits.serving_law(Serving.of(settings), reference=settings.reference)
        best = [
            other.model(other.optimal_params(middle)).params_total
            for other in law.candidates.values()
        ]
        if max(best) < SMALLEST:
            return Served(
                why=f"{scientific(middle)} FLOPs buy at most {short(max(best))} parameters: below "
                f"{short(SMALLEST)} arithmetic and memory do not tell what serving costs"
            )
        solutions = tuple(law.solutions(budgets))
    except UserError as error:
        return Served(why=str(error))
    if not any(s.cost.status == "fits" for s in solutions):
        return Served(why="no model of these budgets fits the GPUs")
    return Served(law, middle, solutions)


def figures(fits: Fits, served: Served) -> list[PlotFigure]:
    """The figures, in the source's order; none where serving is not told."""
    if served.law is None:
        return []
    found = [
        _loss_against_tokens(fits, served),
        _cost_against_size(served),
        _loss_optimal(served),
        _along_sizes(served),
        _over_budgets(served, "smaller, same quality", "equal"),
        _over_budgets(served, "bounded cost", "bounded"),
    ]
    return [f for f in found if f is not None]


def _loss_against_tokens(fits: Fits, served: Served) -> PlotFigure | None:
    """Figure 1: a panel a size, a line an architecture."""
    law, names = served.law, served.names
    assert law is not None
    cells = fits.cells[fits.cells["architecture"].isin(names) & fits.cells["loss"].notna()]
    scales = list(dict.fromkeys(cells.sort_values("params_dense")["scale"]))
    if not len(cells):
        return None
    if len(scales) > PANELS:
        scales = [scales[round(k)] for k in np.linspace(0, len(scales) - 1, PANELS)]
    look = looks(names)
    panels = []
    for scale in scales:
        series: list[Series] = []
        for name in names:
            own = cells[(cells["architecture"] == name) & (cells["scale"] == scale)]
            if not len(own):
                continue
            dense = float(own["params_dense"].iloc[0])
            if not math.isfinite(dense):
                continue
            d, y = own["tokens"], own["loss"].to_numpy(float)
            x = np.geomspace(d.min() / 1.3, d.max() * 1.3, CURVE)
            curve = law.candidates[name].losses_at(np.full(CURVE, dense), x)
            series += [
                Line(f"{name}, law", x, curve, look[name].colour),
                cell_points(name, own, "tokens", y, look[name], QUANTITIES["loss"].write),
            ]
        if series:
            panels.append(Panel(Axis(f"D, tokens, at {scale}", "tokens"), LOSS, tuple(series)))
    return _named("serving-loss", "Loss against tokens at each size, by the joint law", panels,
                  names)  # fmt: skip


def _cost_against_size(served: Served) -> PlotFigure | None:
    """Figure 2."""
    law, names = served.law, served.names
    assert law is not None
    look = looks(names)
    own = [s.params for s in served.solutions if s.status == "found" and s.name in names]
    x = np.geomspace(min(own), max(own), CURVE)
    series = []
    for name in names:
        y = law.candidates[name].dollars(x)
        series.append(Line(name, x, np.where(np.isfinite(y), y, math.nan), look[name].colour))
    panel = Panel(SIZE, COST, tuple(series))
    return _named("serving-cost", "Cost of serving against size", [panel], names, width=7.4)


def _loss_optimal(served: Served) -> PlotFigure | None:
    """Figure 3: what loss-optimal models of the budgets reach and cost."""
    look = looks(served.names)
    by_budget: list[Series] = []
    by_cost: list[Series] = []
    by_training: list[Series] = []
    for name in served.names:
        own = served.of("loss-optimal", name)
        if not own:
            continue
        budget = np.array([s.budget for s in own])
        loss = np.array([s.loss for s in own])
        price = np.array([s.cost.dollars_per_million for s in own])
        by_budget += _drawn(name, budget, loss, look[name], own)
        by_cost += _drawn(name, price, loss, look[name], own)
        same = served.of("same quality", name)
        if same:
            x = np.array([s.budget for s in same])
            y = np.array([s.training_share for s in same])
            by_training += _drawn(name, x, y, look[name], same)
    panels = [Panel(BUDGET, LOSS, tuple(by_budget)), Panel(COST, LOSS, tuple(by_cost))]
    if by_training:
        y = Axis("FLOPs for the reference's loss, ratio", "ratio")
        panels.append(Panel(BUDGET, y, tuple(by_training), neutral=1.0))
    return _named("serving-optimal", "Loss-optimal models over training budgets", panels,
                  served.names)  # fmt: skip


def _along_sizes(served: Served) -> PlotFigure | None:
    """Figure 4: one budget, spent on models of every size."""
    law, names = served.law, served.names
    assert law is not None
    look = looks(names)
    losses: list[Series] = []
    costs: list[Series] = []
    for name in names:
        other = law.candidates[name]
        best = other.optimal_params(served.budget)
        x = np.geomspace(best / WINDOW, best * 3, CURVE)
        price = other.dollars(x)
        price = np.where(np.isfinite(price), price, math.nan)
        here = [s for s in served.of("loss-optimal", name) if s.budget == served.budget]
        losses.append(Line(name, x, other.losses(x, served.budget), look[name].colour))
        costs.append(Line(name, x, price, look[name].colour))
        for s in here:
            at = np.array([s.params])
            for series, y in ((losses, s.loss), (costs, s.cost.dollars_per_million)):
                series.append(
                    Points(f"{name}, loss-optimal", at, np.array([y]), *look[name],
                           tips=[_tip(s)], names=[name], size=40)
                )  # fmt: skip
    panels = [Panel(SIZE, LOSS, tuple(losses)), Panel(SIZE, COST, tuple(costs))]
    return _named("serving-sizes", "Loss and cost of serving along the size at one budget", panels,
                  names)  # fmt: skip


def _over_budgets(served: Served, kind: Kind, name: str) -> PlotFigure | None:
    """Figures 5 and 6: one kind of solution over the budgets, against the reference."""
    look = looks(served.names)
    y_axes = {
        "cost_share": Axis("cost, of the reference's", "ratio"),
        "size_share": Axis("N, of the loss-optimal", "ratio"),
        "saved": Axis("training FLOPs saved", "percent", log=False),
    }
    chosen = ("cost_share", "size_share") if kind == "smaller, same quality" else (
        "saved", "size_share")  # fmt: skip
    panels = []
    for quantity in chosen:
        series: list[Series] = []
        for architecture in served.names:
            own = [s for s in served.of(kind, architecture) if math.isfinite(getattr(s, quantity))]
            if own:
                x = np.array([s.budget for s in own])
                y = np.array([getattr(s, quantity) for s in own])
                series += _drawn(architecture, x, y, look[architecture], own)
        if series:
            neutral = None if quantity == "saved" else 1.0
            panels.append(Panel(BUDGET, y_axes[quantity], tuple(series), neutral=neutral))
    return _named(f"serving-{name}", f"{KINDS[kind]}, over training budgets".capitalize(), panels,
                  served.names)  # fmt: skip


def _drawn(
    name: str, x: np.ndarray, y: np.ndarray, look: Look, own: Sequence[Solution]
) -> list[Series]:
    full = np.array([not s.outside for s in own])
    tips = [_tip(s) for s in own]
    return [
        Line(name, x, y, look.colour, thin=True),
        Points(name, x, y, *look, full=full, tips=tips, names=[name] * len(own), size=36),
    ]


def _tip(s: Solution) -> str:
    return (
        f"{s.name}: N {short(s.params)} on {short(s.tokens)} tokens, loss {s.loss:.4f}, "
        f"{dollars(s.cost.dollars_per_million)} a million tokens{marks(s)}"
    )


def _named(
    name: str, caption: str, panels: Sequence[Panel], names: Sequence[str], width: float = 10.2
) -> PlotFigure | None:
    if not panels:
        return None
    key = ("hollow: outside what was trained",) if name not in ("serving-loss",) else ()
    return PlotFigure(name, caption, tuple(panels), tuple(names), width=width, height=2.9, key=key)


def rows(served: Served) -> list[dict[str, Any]]:
    """The solutions of one budget, written."""
    return [
        {
            "name": s.name,
            "kind": s.kind,
            "cells": [
                *(said(s) for _, head, said in COLUMNS if head),
                marks(s).removeprefix(" ! "),
            ],
        }
        for s in served.solutions
        if s.budget == served.budget and s.status == "found" and s.cost.status == "fits"
    ]


def words(served: Served) -> dict[str, Any]:
    """What the section says in sentences: the law, the reference, the assumptions, the kinds."""
    law = served.law
    if law is None:
        return {}
    return {
        "law": law.curve.law,
        "count": COUNT_NAMES.get(law.curve.count, law.curve.count),
        "coefficients": list(law.curve.coefficients.items()),
        "reference": law.reference,
        "heads": [head for _, head, _ in COLUMNS if head],
        "assumptions": assumptions(law.serving),
        "kinds": list(KINDS.items()),
        "budget": served.budget,
    }


__all__ = ["CandidateCurves", "Served", "figures", "rows", "serve", "words"]
