"""write_comparison(comparison, folder): any number of sides on one self-contained HTML page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.report.figure import (
    Axis,
    Line,
    Look,
    Panel,
    PlotFigure,
    Points,
    Series,
    by_name,
    cell_points,
    colours,
    listed_height,
    looks,
)
from raysweep.report.interactive import packed_figures
from raysweep.report.laws import FLOPS, paths_along, told_along
from raysweep.report.render import figure_context, render, write_page
from raysweep.scaling.compare import EQUALS, Arm, Ratio, needed
from raysweep.scaling.quantities import ANSWERS, QUANTITIES, TARGETS, Quantity
from raysweep.scaling.runs import AXES, RunMaker
from raysweep.scaling.sides import Comparison

SCRIPTS = ("common.js", "address.js", "figures.js", "plots.js")
"""What the page runs, in order."""


def write_comparison(
    comparison: Comparison | Sequence[Arm],
    folder: str | os.PathLike[str],
    *,
    title: str | None = None,
    png: bool = False,
    command: str = "",
) -> Path:
    """Write `folder/index.html`, one file that needs nothing else, and return its path.

    The page shows what the comparison says, or that of the arms. `command` makes the page again.
    With `png` the figures are written beside it.
    """
    found = comparison if isinstance(comparison, Comparison) else Comparison.of(comparison)
    names = [arm.name for arm in found.arms]
    figures = by_name([ratios_figure(found.ratios, names), arms_figure(found.arms)])
    context: dict[str, Any] = figure_context(figures) | {
        "title": title or _listed(names),
        "names": names,
        "arms": [
            {"name": a.name, "cells": len(a.cells), "trials": float(a.cells["n_finished"].sum())}
            for a in found.arms
        ],
        "colours": colours(names),
        "size": found.size,
        "sides": _sides(found),
        "ratios": {name: ratio_rows(own) for name, own in found.ratios.items()},
        "shifts": found.shifts,
        "apart": found.apart,
        "packed": packed_figures(figures.values()),
        "command": command,
    }
    html = render("compare.html", SCRIPTS, context)
    return write_page(folder, html, figures.values() if png else ())


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _sides(found: Comparison) -> list[dict[str, Any]]:
    """One row a side: its answer at the common size, and its ratios over the first."""
    rows = []
    for name, answer in found.answers.items():
        own = found.ratios.get(name, [])
        over = {q: needed(own, q, "N and D") for q in ANSWERS} | {
            "flops": needed(own, "flops", "loss")
        }
        rows.append({"name": name, "run": answer, "over": over})
    return rows


def ratio_rows(ratios: Sequence[Ratio]) -> list[tuple[Quantity, dict[str, Ratio]]]:
    """By quantity its ratio where each thing is held equal."""
    rows = [
        (one, {r.at_equal: r for r in ratios if r.quantity == key})
        for key, one in QUANTITIES.items()
    ]
    return [(one, own) for one, own in rows if own]


def ratios_figure(ratios: Mapping[str, Sequence[Ratio]], names: Sequence[str]) -> PlotFigure | None:
    """Every ratio with its interval, a row each, hollow where it leaves 1 in; None without any."""
    order = list(QUANTITIES)
    rows = [(name, r) for name, own in ratios.items() for r in own if r.ok]
    rows.sort(key=lambda row: (order.index(row[1].quantity), EQUALS.index(row[1].at_equal)))
    if not rows:
        return None
    look = looks(names)
    labels = list(dict.fromkeys(r.name for _, r in rows))
    series: list[Series] = []
    count = len(ratios)
    for k, name in enumerate(ratios):
        own = [r for other, r in rows if other == name]
        if not own:
            continue
        at = [labels.index(r.name) for r in own]
        off = 0.0 if count < 2 else 0.5 * (k / (count - 1) - 0.5)
        series.append(
            Points(
                f"{name} over {names[0]}",
                np.array([r.ratio.value for r in own]),
                np.array(at, float) + off,
                *look[name],
                np.array([r.ratio.low for r in own]),
                np.array([r.ratio.high for r in own]),
                np.array([r.clear for r in own]),
                tips=[r.said for r in own],
            )
        )
    x = Axis(f"over {names[0]}: 1 is no difference", "number")
    return PlotFigure(
        "ratios",
        "Ratios of the sides with 95 % intervals",
        (Panel(x, Axis("", names=tuple(labels)), tuple(series), neutral=1.0),),
        tuple(names[1:]) if count > 1 else (),
        height=listed_height(len(labels) * (1 if count < 3 else 2)),
        key=("hollow: the interval leaves 1 in",),
    )


def arms_figure(arms: Sequence[Arm]) -> PlotFigure:
    """Optima and loss of each side's cells against compute, with the law of each."""
    names = [arm.name for arm in arms]
    look = looks(names)
    panels = []
    for quantity in ANSWERS:
        series: list[Series] = []
        for arm in arms:
            cells, evidence = arm.cells, arm.evidence
            if not len(cells):
                continue
            first = arm.run(*cells[[AXES["N"], AXES["D"]]].iloc[0])
            maker = RunMaker.after(
                cells, experts=first.experts, top_k=first.top_k, group=first.group
            )
            for path in paths_along(cells, maker, FLOPS)[:1]:
                y, low, high = told_along(evidence, arm.architecture, path, quantity).T
                if np.isfinite(y).any():
                    series.append(
                        Line(f"{arm.name}, law", path.along(FLOPS), y, look[arm.name].colour,
                             low, high)
                    )  # fmt: skip
            series.append(_cell_dots(arm, quantity, look[arm.name]))
        if any(np.isfinite(s.y).any() for s in series if isinstance(s, Points)):
            panels.append(Panel(Axis.of(FLOPS), Axis.of(quantity, best=True), tuple(series)))
    return PlotFigure(
        "sides",
        "Optimal learning rate, batch and loss of each side's cells against compute",
        tuple(panels),
        tuple(names),
        height=3.2,
    )


def _cell_dots(arm: Arm, quantity: str, look: Look) -> Points:
    cells, evidence = arm.cells, arm.evidence
    y = cells["loss"].to_numpy(float)
    if quantity in TARGETS:
        optima = [evidence.optimum(evidence.sizes[str(c)]) for c in cells.index]
        y = np.array([math.nan if o is None else getattr(o, quantity) for o in optima])
    return cell_points(arm.name, cells, FLOPS, y, look, QUANTITIES[quantity].write)
