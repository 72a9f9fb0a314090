"""The figure of budgets: loss against size at each, and the best sizes and tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.report.figures import MOST_ARCHITECTURES, PlotFigure
from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    MARKERS,
    finish,
    log_axis,
    new_figure,
    scientific,
    settings,
    short,
)
from raysweep.report.trends import names_of
from raysweep.scaling.compute.allocation import lies_outside, outside, ranges_of
from raysweep.scaling.compute.budgets import Split, routing_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.loss.data import levels
from raysweep.scaling.loss.model import LossModel

SLICES = 4
"""Budgets at which a law is cut where none was held."""

WINDOW = 30.0
"""A slice is drawn this far to either side of its best size."""

BAND = 3.0
"""Bands are seen this far beyond the lines."""

CURVE_POINTS = 61

DASHED = (0, (4, 2))


def split_names(fits: Fits) -> list[str]:
    """The architectures whose law tells how to split a budget."""
    return [name for name in names_of(fits) if fits.allocation[name].ok][:MOST_ARCHITECTURES]


def budget_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """Loss against parameters at each budget with its best size, and the best sizes and tokens
    against compute; None where no law tells."""
    names = split_names(fits)
    if not names:
        return None
    rows: list[dict[str, object]] = []
    tips: dict[str, list[str]] = {}
    with settings():
        figure = new_figure(10.2, 3.7)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        for axes, quantity in ((middle, "params"), (right, "tokens")):
            best = [getattr(a, quantity) for n in names for a in fits.allocation[n].path]
            axes.set_yscale("log")
            axes.set_ylim(min(best) / BAND, max(best) * BAND)
        for i, name in enumerate(names):
            split = fits.allocation[name]
            model = split.model
            assert model is not None
            index = names_of(fits).index(name)
            if split.parabolas is not None:
                rows += _measured(left, name, split, model, index, i == 0, tips)
            else:
                rows += _slices(left, name, split, model, index, i == 0, tips)
            for axes, quantity in ((middle, "params"), (right, "tokens")):
                rows += _path(axes, name, split, quantity, ranges_of(model)[quantity], index, tips)
        left.margins(x=0.13)
        for axes, label in ((left, ""), (middle, "best N, parameters"), (right, "best D, tokens")):
            axes.set_xlabel("N, parameters" if axes is left else "C, training FLOPs")
            axes.set_ylabel(label or "loss, nats a token")
            log_axis(axes, "x", "count" if axes is left else "flops", 5)
            log_axis(axes, "y", "loss" if axes is left else "count", 5)
            axes.grid(True)
            axes.set_axisbelow(True)
        label = "Loss against model size at fixed budgets, and the best split of budgets"
        drawing = finish(figure, "budgets", label, tips, png, names)
    return PlotFigure("budgets", drawing, pd.DataFrame(rows), tuple(names))


def _measured(
    axes: Axes,
    name: str,
    split: Split,
    model: LossModel,
    index: int,
    labelled: bool,
    tips: dict[str, list[str]],
) -> list[dict[str, object]]:
    """The runs of each held budget with the parabola through them and its minimum."""
    assert split.parabolas is not None
    assert model.law is not None
    colour = LIGHT[ARCHITECTURE_COLOURS[index]]
    inputs, _ = model.data.inputs(model.law)
    params, tokens, flops, losses = (
        inputs["params"],
        inputs["tokens"],
        model.data.flops,
        model.data.loss,
    )
    level = levels(flops)
    axes.scatter(params, losses, s=13, c=colour, marker=MARKERS[index], alpha=0.75, lw=0,
                 gid=f"runs{index}", zorder=3)  # fmt: skip
    tips[f"runs{index}"] = [
        f"{scientific(c)} FLOPs: N {short(n)}, D {short(d)}, loss {loss:.4f}"
        for c, n, d, loss in zip(flops, params, tokens, losses, strict=True)
    ]
    rows: list[dict[str, object]] = [
        {"what": "run", "architecture": name, "flops": c, "params": n, "tokens": d, "loss": y}
        for c, n, d, y in zip(flops, params, tokens, losses, strict=True)
    ]
    for k, parabola in enumerate(split.parabolas.parabolas):
        if not np.isfinite(parabola.params):
            continue
        own = params[level == k]
        x = np.geomspace(own.min(), own.max(), CURVE_POINTS)
        axes.plot(x, parabola.at(x), color=colour, linewidth=1.1, zorder=2)
        _mark(axes, parabola.params, parabola.loss, colour, parabola.status == "interior")
        if labelled:
            _name_budget(axes, float(x[-1]), float(parabola.at(x)[-1]), parabola.flops, colour)
    return rows


def _slices(
    axes: Axes,
    name: str,
    split: Split,
    model: LossModel,
    index: int,
    labelled: bool,
    tips: dict[str, list[str]],
) -> list[dict[str, object]]:
    """The law cut at budgets from the smallest cell's to the largest's: no measurement."""
    assert split.optimum is not None
    colour = LIGHT[ARCHITECTURE_COLOURS[index]]
    low, high = np.log([split.path[0].flops, split.flops])
    rows: list[dict[str, object]] = []
    given = routing_of(model)
    flops = np.log([a.flops for a in split.path])
    best = np.log([[a.params, a.tokens] for a in split.path])
    for budget in np.linspace(low, high, SLICES):
        n, d = (float(np.exp(np.interp(budget, flops, best[:, k]))) for k in range(2))
        x = np.geomspace(n / WINDOW, n * WINDOW, CURVE_POINTS)
        tokens = n * d / x
        y = model.predict_mean({"params": x, "tokens": tokens, **given})[0]
        axes.plot(x, y, color=colour, linewidth=1.1, ls=DASHED, zorder=2)
        own = {"params": np.array([n]), "tokens": np.array([d]), **given}
        at = float(model.predict_mean(own)[0][0])
        inside = not lies_outside(outside(ranges_of(model), n, d))
        gid = f"best{index}-{len(rows)}"
        _mark(axes, n, at, colour, inside, gid)
        tips[gid] = [
            f"best of {scientific(float(np.exp(budget)))} FLOPs: N {short(n)}, D {short(d)} "
            f"({'inside' if inside else 'outside'} the cells)"
        ]
        if labelled:
            _name_budget(axes, float(x[-1]), float(y[-1]), float(np.exp(budget)), colour)
        rows += [
            {"what": "slice of the law", "architecture": name, "flops": float(np.exp(budget)),
             "params": a, "tokens": b, "loss": c}
            for a, b, c in zip(x, tokens, y, strict=True)
        ]  # fmt: skip
    return rows


def _mark(
    axes: Axes, x: float, y: float, colour: str, inside: bool, gid: str | None = None
) -> None:
    paper = LIGHT["paper"]
    face, edge = (colour, paper) if inside else (paper, colour)
    axes.scatter(
        [x], [y], s=62, marker="P", c=face, edgecolors=edge, linewidths=0.9, zorder=4, gid=gid
    )


def _name_budget(axes: Axes, x: float, y: float, flops: float, colour: str) -> None:
    axes.annotate(
        scientific(flops, 2),
        (x, y),
        xytext=(5, 2),
        textcoords="offset points",
        fontsize=7,
        va="center",
        color=colour,
        annotation_clip=False,
    )


def _path(
    axes: Axes,
    name: str,
    split: Split,
    quantity: str,
    tried: tuple[float, float],
    index: int,
    tips: dict[str, list[str]],
) -> list[dict[str, object]]:
    """The law's best N or D along compute with its band, and the parabolas' minima.

    `tried` are the smallest and the largest of that quantity among the cells."""
    colour = LIGHT[ARCHITECTURE_COLOURS[index]]
    x = np.array([a.flops for a in split.path])
    y = np.array([getattr(a, quantity) for a in split.path])
    ends = np.array([a.intervals.get(quantity, (np.nan, np.nan)) for a in split.path]).T
    # Solid where such sizes (or tokens) were tried, dashed where the law alone tells of them.
    along = np.geomspace(x[0], x[-1], CURVE_POINTS)
    best = np.exp(np.interp(np.log(along), np.log(x), np.log(y)))
    smallest, largest = tried
    tried_best = np.where((best >= smallest) & (best <= largest), best, np.nan)
    axes.plot(along, best, color=colour, linewidth=1.1, ls=DASHED, zorder=2)
    axes.plot(along, tried_best, color=colour, linewidth=1.7, zorder=3)
    if np.isfinite(ends).all():
        low, high = axes.get_ylim()
        band = np.clip(ends, low / 2, 2 * high)
        axes.fill_between(x, *band, color=colour, alpha=0.12, lw=0, zorder=1)
    axes.axvline(split.flops, color=LIGHT["faint"], linewidth=0.8, ls=":", zorder=1)
    rows: list[dict[str, object]] = [
        {"what": f"best {quantity} by the law", "architecture": name, "flops": a, quantity: b,
         "low": lo, "high": hi, "status": split.path[i].status}
        for i, (a, b, lo, hi) in enumerate(zip(x, y, *ends, strict=True))
    ]  # fmt: skip
    if split.parabolas is not None:
        known = [p for p in split.parabolas.parabolas if np.isfinite(p.params)]
        gid = f"best-{quantity}{index}"
        full = [p.status == "interior" for p in known]
        axes.scatter(
            [p.flops for p in known],
            [getattr(p, quantity) for p in known],
            s=46,
            marker="P",
            facecolors=[colour if k else LIGHT["paper"] for k in full],
            edgecolors=[LIGHT["paper"] if k else colour for k in full],
            linewidths=0.9,
            zorder=4,
            gid=gid,
        )
        tips[gid] = [
            f"parabola at {scientific(p.flops)} FLOPs: N {short(p.params)}, D {short(p.tokens)} "
            f"({p.status})"
            for p in known
        ]
        rows += [
            {"what": "parabola", "architecture": name, "flops": p.flops, "params": p.params,
             "tokens": p.tokens, "loss": p.loss, "status": p.status}
            for p in known
            if quantity == "params"
        ]  # fmt: skip
    return rows
