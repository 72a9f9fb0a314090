"""The figures of a comparison: every ratio with its interval, and losses of cells of one size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from raysweep.report.figures import PlotFigure
from raysweep.report.style import LIGHT, finish, log_axis, new_figure, settings
from raysweep.report.trends import FLOPS
from raysweep.scaling.compare import Comparison
from raysweep.scaling.contrast import MATCHED, OWN_LAWS, Contrast
from raysweep.scaling.quantities import QUANTITIES
from raysweep.text import scientific

REACH = 5.0
"""The axis of ratios goes as far as this factor beyond the outermost estimate and no farther."""


def ratios_figure(
    comparison: Comparison, colours: Mapping[str, str], *, png: bool = False
) -> PlotFigure | None:
    """Every ratio with its interval, a row each, hollow where it leaves 1 in; None without any."""
    rows = [
        (pair.other, pair.reference, c)
        for pair in comparison.pairs
        for c in pair.contrasts
        if c.ok and math.isfinite(c.ratio)
    ]
    if not rows:
        return None
    order = list(QUANTITIES)
    rows.sort(key=lambda r: order.index(r[2].quantity))
    several = len(comparison.pairs) > 1
    with settings():
        figure = new_figure(10.2, 0.7 + 0.25 * len(rows))
        axes = figure.subplots()
        axes.axvline(1, color=LIGHT["faint"], linewidth=1)
        low, high = _ends([c for *_, c in rows])
        for place, (other, _, c) in enumerate(reversed(rows)):
            colour = LIGHT[colours[other]]
            if math.isfinite(c.low):
                ends = np.clip([c.low, c.high], low / 2, high * 2)
                axes.plot(ends, [place, place], color=colour, linewidth=1.6)
            face = colour if c.clear else LIGHT["paper"]
            axes.scatter([c.ratio], [place], s=30, c=face, edgecolors=colour, zorder=3)
        words = [_label(c, other if several else "") for other, _, c in reversed(rows)]
        axes.set_yticks(range(len(rows)), words)
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlim(low, high)
        log_axis(axes, "x", "count", 7)
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"over {rows[0][1]}: 1 is no difference" if not several else "ratio")
        drawing = finish(figure, "ratios", "Ratios of the sides with 95 % intervals", {}, png)
    data = pd.DataFrame(
        [
            {"other": other, "reference": reference, "quantity": c.quantity,
             "at_equal": c.at_equal, "by": c.how, "ratio": c.ratio, "low": c.low, "high": c.high}
            for other, reference, c in rows
        ]
    )  # fmt: skip
    return PlotFigure("ratios", drawing, data)


def _label(c: Contrast, other: str) -> str:
    means = {MATCHED: "same cells", OWN_LAWS: "own laws"}.get(c.how, "")
    name = f"{QUANTITIES[c.quantity].optimal} at equal {c.at_equal}"
    return ", ".join(part for part in (name, means, other) if part)


def _ends(contrasts: Sequence[Contrast]) -> tuple[float, float]:
    ratios = [c.ratio for c in contrasts]
    least, most = min(ratios) / REACH, max(ratios) * REACH
    low = min([*ratios, *(c.low for c in contrasts if c.low > least), 0.8])
    high = max([*ratios, *(c.high for c in contrasts if c.high < most), 1.25])
    return low / 1.15, high * 1.15


def gaps_figure(
    comparison: Comparison, colours: Mapping[str, str], *, png: bool = False
) -> PlotFigure | None:
    """Loss over the reference's in cells of the same size, against compute; None without any."""
    pairs = [p for p in comparison.pairs if p.cells]
    if not pairs:
        return None
    tips: dict[str, list[str]] = {}
    with settings():
        figure = new_figure(7.4, 3.2)
        axes = figure.subplots()
        axes.axhline(0, color=LIGHT["faint"], linewidth=1)
        for k, pair in enumerate(pairs):
            colour = LIGHT[colours[pair.other]]
            x = np.array([c.flops for c in pair.cells])
            gap, low, high = (
                100 * (np.array([getattr(c, name) for c in pair.cells]) - 1)
                for name in ("ratio", "low", "high")
            )
            known = np.isfinite(low)
            error = np.stack([gap - low, high - gap])[:, known]
            axes.errorbar(
                x[known], gap[known], yerr=error, fmt="none", ecolor=colour, elinewidth=0.9
            )
            gid = f"gaps{k}"
            axes.scatter(x, gap, s=28, c=colour, edgecolors=LIGHT["paper"], zorder=4, gid=gid)
            tips[gid] = [
                f"{c.other} against {c.reference}: {scientific(c.flops)} FLOPs, {g:+.2f} %"
                for c, g in zip(pair.cells, gap, strict=True)
            ]
        log_axis(axes, "x", "flops", 6)
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.set_xlabel(QUANTITIES[FLOPS].axis)
        axes.set_ylabel("loss above the reference's, %")
        label = "Difference in loss of cells of the same size against compute"
        drawing = finish(figure, "gaps", label, tips, png, [p.other for p in pairs])
    data = pd.DataFrame(
        [
            {"other": p.other, "reference": p.reference, "cell": c.other,
             "reference_cell": c.reference, "params": c.params, "tokens": c.tokens,
             "flops": c.flops, "loss": c.other_loss, "reference_loss": c.reference_loss,
             "ratio": c.ratio, "low": c.low, "high": c.high}
            for p in pairs
            for c in p.cells
        ]
    )  # fmt: skip
    return PlotFigure("gaps", drawing, data)
