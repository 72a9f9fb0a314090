"""The figure of sensitivity: the laws of optima under other methods and other cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from raysweep.report.figures import PlotFigure
from raysweep.report.rows import Mark, draw_rows, rows_height, rows_units
from raysweep.report.style import ARCHITECTURE_COLOURS, finish, log_axis, new_figure, settings
from raysweep.report.trends import names_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import QUANTITIES, SEARCHED


def variants_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """What each variant of a law predicts, over the law as reported; None without two of any."""
    names = names_of(fits)[: len(ARCHITECTURE_COLOURS)]
    labels = _labels(fits, names)
    if len(labels) < 2:
        return None
    rows: list[dict[str, object]] = []
    tips: dict[str, list[str]] = {}
    panels = {}
    for target in SEARCHED:
        panels[target], more = _marks(fits, names, target, labels)
        rows += more
    with settings():
        room = max(sum(rows_units(labels, marks)) for marks in panels.values())
        figure = new_figure(10.2, rows_height(room))
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for k, (axes, (target, marks)) in enumerate(zip(grid, panels.items(), strict=True)):
            tips |= draw_rows(axes, labels, marks, 1.0, f"variants{k}", room)
            log_axis(axes, "x", "count", 6)
            axes.set_xlabel(f"{QUANTITIES[target].optimal}, over that reported")
            if k:
                axes.set_yticklabels([])
        label = "Predictions of the laws of optima refitted in other ways, over those reported"
        drawing = finish(figure, "variants", label, tips, png, names)
    return PlotFigure("variants", drawing, pd.DataFrame(rows))


def _marks(
    fits: Fits, names: Sequence[str], target: str, labels: Sequence[str]
) -> tuple[list[Mark], list[dict[str, object]]]:
    """The variants of every architecture's law of one optimum, and their data."""
    write = QUANTITIES[target].write
    marks: list[Mark] = []
    rows: list[dict[str, object]] = []
    for name, colour in zip(names, ARCHITECTURE_COLOURS, strict=False):
        found = fits.sensitivity[name].get(target)
        for v in found.variants if found else ():
            assert found is not None
            rows.append(
                {"architecture": name, "target": target, "variant": v.name, "cells": v.n_cells,
                 "params": found.params, "tokens": found.tokens, "value": v.at.value,
                 "low": v.at.low, "high": v.at.high, "status": v.status,
                 **{f"{q}_exponent": e.value for q, e in v.exponents.items()}}
            )  # fmt: skip
            if math.isfinite(v.at.value):
                base = found.variants[0].at.value
                ratio, low, high = (x / base for x in (v.at.value, v.at.low, v.at.high))
                tip = f"{name}, {v.name}: {write(v.at.value)}, {v.n_cells} cells"
                marks.append(Mark(labels.index(v.name), ratio, low, high, colour, tip=tip))
    return marks, rows


def _labels(fits: Fits, names: list[str]) -> list[str]:
    """Variants that could be fitted for any architecture, in order of their first mention."""
    seen = [
        v.name
        for name in names
        for found in fits.sensitivity[name].values()
        for v in found.variants
        if math.isfinite(v.at.value)
    ]
    order = [v.name for n in names for s in fits.sensitivity[n].values() for v in s.variants]
    return [name for name in dict.fromkeys(order) if name in seen]
