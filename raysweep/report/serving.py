"""Serving: what a training budget buys with each number of experts, and what serving costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.errors import UserError
from raysweep.report.figures import PlotFigure
from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    MARKERS,
    finish,
    log_axis,
    new_figure,
    settings,
    short,
)
from raysweep.report.trends import FLOPS, asked_of
from raysweep.scaling.compute.roofline import find_gpu
from raysweep.scaling.compute.serving import FAR_BEYOND, Serving, Solution, serving_dict
from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import Recommendation

GPU = "h100"
DOLLARS = 1.0
"""Of one GPU an hour: a unit to scale by one's own price, not a price."""

SMALLEST = 1e7
"""Below so many parameters a GPU's roofline says nothing of what a model costs to serve."""

KINDS = ("loss-optimal", "equal quality", "equal cost")
PLACES = ((8, 0, "left"), (0, 8, "center"), (-8, 0, "right"))
"""Where each kind's numbers of experts stand: offset in points, alignment."""

WORDS = {
    "loss-optimal": "loss-optimal",
    "equal quality": "smaller, of equal quality",
    "equal cost": "of equal serving cost",
    "same quality, more compute": "of equal quality, with more compute",
}


@dataclass(frozen=True)
class Served:
    """The solutions for one budget, with what `raysweep serving --json` prints of them; or why
    there are none."""

    solutions: tuple[Solution, ...] = ()
    data: dict[str, Any] | None = None
    message: str = ""

    @property
    def shown(self) -> list[tuple[int, Solution]]:
        """The solutions that were found and can be served, with their place in `data`."""
        return [
            (i, s)
            for i, s in enumerate(self.solutions)
            if s.status == "found" and s.cost.status == "fits"
        ]


def serve(fits: Fits, answers: Sequence[Recommendation]) -> Served:
    """What the compute of the largest run asked about would buy, as far as the fits can tell."""
    budgets = [
        target.inputs[FLOPS]
        for name in fits.groups
        for _, target in asked_of(answers, name, fits.groups[name].cells)
    ]
    known = [c for c in budgets if math.isfinite(c)]
    if not known:
        return Served(message="no run is asked about, so there is no budget to spend")
    flops = float(f"{max(known):.3g}")
    serving = Serving(find_gpu(GPU), DOLLARS)
    try:
        solutions = fits.serve(flops, serving)
    except UserError as error:
        return Served(message=str(error))
    largest = max(s.params_total for s in solutions if s.kind == "loss-optimal")
    if largest < SMALLEST:
        return Served(
            message=f"the models that {flops:.2g} FLOPs buy have at most {short(largest)} "
            f"parameters: below {short(SMALLEST)} the cost of serving is not that of their "
            "arithmetic and memory"
        )
    served = Served(tuple(solutions), serving_dict(solutions, serving, flops))
    return served if served.shown else Served(message="no model of this budget fits the GPUs")


def serving_figure(served: Served, *, png: bool = False) -> PlotFigure | None:
    """Loss against the cost of a million tokens, a line a kind of solution; None without any."""
    if not served.shown:
        return None
    tips: dict[str, list[str]] = {}
    with settings():
        figure = new_figure(7.4, 3.9)
        axes = figure.subplots()
        for kind, colour, marker, place in zip(
            KINDS, ARCHITECTURE_COLOURS, MARKERS, PLACES, strict=False
        ):
            own = [s for _, s in served.shown if s.kind == kind]
            own.sort(key=lambda s: s.experts)
            if own:
                gid = "serving-" + kind.replace(" ", "-")
                _draw_kind(axes, own, colour, marker, place, gid)
                tips[gid] = [_tip(s) for s in own]
        log_axis(axes, "x", "flops", 5)
        axes.margins(x=0.1, y=0.12)
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"dollars a million generated tokens, at {DOLLARS:g} dollar a GPU-hour")
        axes.set_ylabel("loss, nats a token")
        label = "Loss against the cost of serving for each number of experts"
        drawing = finish(figure, "serving", label, tips, png, [WORDS[k] for k in KINDS])
    rows = [
        {"kind": s.kind, "experts": s.experts, "params": s.params, "params_total": s.params_total,
         "params_active": s.params_active, "tokens": s.tokens, "loss": s.loss, "flops": s.flops,
         "size_share": s.size_share, "beyond": s.beyond,
         "dollars_per_million": s.cost.dollars_per_million, "gpus": s.cost.gpus}
        for _, s in served.shown
    ]  # fmt: skip
    return PlotFigure("serving", drawing, pd.DataFrame(rows))


def _draw_kind(
    axes: Axes,
    own: Sequence[Solution],
    colour: str,
    marker: str,
    place: tuple[float, float, str],
    gid: str,
) -> None:
    """One kind of solution, a mark a number of experts; hollow far outside what was fitted."""
    x = np.array([s.cost.dollars_per_million for s in own])
    y = np.array([s.loss for s in own])
    near = [s.beyond < FAR_BEYOND for s in own]
    axes.plot(x, y, color=LIGHT[colour], linewidth=1, alpha=0.6, zorder=2)
    axes.scatter(
        x,
        y,
        s=40,
        marker=marker,
        facecolors=[LIGHT[colour if k else "paper"] for k in near],
        edgecolors=[LIGHT["paper" if k else colour] for k in near],
        linewidths=[0.7 if k else 1.3 for k in near],
        zorder=3,
        gid=gid,
    )
    for s, a, b in zip(own, x, y, strict=True):
        axes.annotate(
            f"{s.experts:g}",
            (a, b),
            xytext=place[:2],
            textcoords="offset points",
            ha=place[2],
            va="center",
            fontsize=7,
            color=LIGHT[colour],
        )


def _tip(s: Solution) -> str:
    return (
        f"{s.experts:g} experts, {WORDS[s.kind]}: N {short(s.params)}, D {short(s.tokens)}, "
        f"loss {s.loss:.4f}, {s.cost.dollars_per_million:.3g} a million on {s.cost.gpus} GPUs"
    )
