"""What trials measured beside their loss: the gradient noise scale, and the load of experts."""

from __future__ import annotations

import numpy as np

from raysweep.report.figure import Axis, Line, Panel, PlotFigure, Points, Series, cell_points, looks
from raysweep.report.laws import FLOPS, names_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import QUANTITIES
from raysweep.text import estimated, short

LOADS = {
    "expert_load_entropy": "entropy of the load",
    "expert_load_max_over_mean": "busiest expert, times the mean",
    "router_confidence": "router confidence",
}


def noise_figure(fits: Fits) -> PlotFigure | None:
    """Noise scale of each cell against its loss, and against its optimal batch; None where no cell
    measured it."""
    if not fits.architectures:
        return None
    table = fits.cells.assign(
        noise=fits.noise_scale["noise_scale_tokens"], log_sd=fits.noise_scale["log_sd"]
    )
    table = table[table["noise"].notna() & table["loss"].notna()]
    names = [n for n in names_of(fits) if (table["architecture"] == n).any()]
    if not names:
        return None
    look = looks(fits.architectures)
    by_loss: list[Series] = []
    by_batch: list[Series] = []
    for name in names:
        own = table[table["architecture"] == name]
        y, half = own["noise"].to_numpy(float), 1.96 * own["log_sd"].to_numpy(float)
        law = fits.noise_laws.get(name)
        if law is not None:
            x = np.geomspace(own["loss"].min(), own["loss"].max(), 2)
            exponent = law.exponents["loss"].value
            by_loss.append(Line(f"{name}, law", x, law.b0 * x**exponent, look[name].colour))
        for series, column in ((by_loss, "loss"), (by_batch, "batch_tokens")):
            if own[column].notna().any():
                ends = y * np.exp(-half), y * np.exp(half)
                series.append(cell_points(name, own, column, y, look[name], _tokens, *ends))
    y_axis = Axis.of("noise_scale_tokens")
    panels = [Panel(Axis.of("loss", reverse=True), y_axis, tuple(by_loss))]
    if by_batch:
        both = [s for s in by_batch if isinstance(s, Points)]
        ends = np.concatenate([np.r_[s.x, s.y] for s in both])
        line = np.array([ends.min(), ends.max()])
        equal = Line("equal", line, line, "faint", thin=True, end="equal")
        x_axis = Axis.of("batch_tokens", best=True)
        panels.append(Panel(x_axis, y_axis, (equal, *by_batch)))
    return PlotFigure(
        "noise",
        "Gradient noise scale of each cell against its loss and its optimal batch",
        tuple(panels),
        tuple(names),
        width=7.4,
    )


def _tokens(value: float) -> str:
    return f"{short(value)} tokens"


def noise_rows(fits: Fits) -> list[dict[str, str]]:
    """The laws of the noise scale as text."""
    return [
        {
            "name": name,
            "law": f"{short(law.b0)} L^a",
            "exponent": estimated(law.exponents["loss"], style="exponent"),
            "cells": str(law.n),
        }
        for name, law in fits.noise_laws.items()
    ]


def load_figure(fits: Fits) -> PlotFigure | None:
    """Load and confidence of routers of each MoE cell against compute; None where not measured."""
    load = fits.expert_load
    shown = [c for c in LOADS if len(load) and load[c].notna().any()]
    if not shown:
        return None
    table = load.join(fits.cells[["architecture", FLOPS]])
    look = looks(fits.architectures)
    panels = []
    for column in shown:
        series: list[Series] = []
        for name, own in table[table[column].notna()].groupby("architecture", sort=False):
            y, sd = own[column].to_numpy(float), own[f"{column}_sd"].fillna(0).to_numpy(float)
            dots = (look[str(name)], "{:.3g}".format, y - sd, y + sd)
            series.append(cell_points(str(name), own, FLOPS, y, *dots))
        axis = Axis(LOADS[column], "number", log=False)
        panels.append(Panel(Axis.of(FLOPS), axis, tuple(series)))
    return PlotFigure(
        "load",
        "Load of experts and confidence of routers of each cell against compute",
        tuple(panels),
        tuple(n for n in names_of(fits) if (table["architecture"] == n).any()),
        width=10.2 if len(panels) > 2 else 7.4,
        height=2.6,
    )


def not_measured(fits: Fits) -> list[tuple[str, str]]:
    """(what, why) of what no figure shows."""
    found = []
    if noise_figure(fits) is None:
        found.append((QUANTITIES["noise_scale_tokens"].name, "no trial measured it"))
    moe = any(fits.kind(name) == "moe" for name in fits.architectures)
    if moe and load_figure(fits) is None:
        found.append(("load of experts", "no trial measured it"))
    return found
