"""The figures of the loss: against compute with its law and residuals, and dense against MoE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.report.figures import (
    AXIS_NAMES,
    MOST_ARCHITECTURES,
    PlotFigure,
    draw_line,
    held_words,
    label_ends,
)
from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    MARKERS,
    finish,
    log_axis,
    new_figure,
    scientific,
    settings,
)
from raysweep.report.trends import FLOPS, Line, loss_along, names_of, reach_of
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.group_loss import predict_loss
from raysweep.scaling.recommend import Recommendation


def loss_figure(
    fits: Fits, answers: Sequence[Recommendation], laws: Mapping[str, str], *, png: bool = False
) -> PlotFigure | None:
    """Loss at the optimum against compute with its law, and what the law leaves over.

    `laws` names each architecture's law of the loss."""
    cells = fits.cells[fits.cells["loss"].notna()]
    names = [n for n in names_of(fits) if (cells["architecture"] == n).any()][:MOST_ARCHITECTURES]
    if not names:
        return None
    rows: list[dict[str, object]] = []
    tips: dict[str, list[str]] = {}
    ends: list[tuple[Line, str]] = []
    with settings():
        figure = new_figure(10.2, 3.6)
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        for i, name in enumerate(names):
            colour, marker = LIGHT[ARCHITECTURE_COLOURS[i]], MARKERS[i]
            own = cells[cells["architecture"] == name]
            x, y = own[FLOPS].to_numpy(float), own["loss"].to_numpy(float)
            good = (own["loss_from"] == "optimum").to_numpy()
            reach = reach_of(answers, name, FLOPS, own)
            lines = (
                loss_along(fits, name, laws[name], reach, len(names) == 1) if name in laws else []
            )
            for k, line in enumerate(lines):
                draw_line(left, line, colour, first=k == 0)
                rows += [
                    {"what": "law", "architecture": name, "cell": line.held, "flops": c,
                     "loss": m, "low": lo, "high": hi}
                    for c, m, lo, hi in zip(line.x, line.y, line.low, line.high, strict=True)
                ]  # fmt: skip
            ends += [(line, colour) for line in lines if line.held]
            predicted = _predicted(fits, name, laws.get(name), own)
            for axes, values, gid in (
                (left, y, "loss"),
                (right, 100 * (y / predicted - 1), "rest"),
            ):
                axes.scatter(
                    x,
                    values,
                    s=26,
                    marker=marker,
                    facecolors=[colour if k else LIGHT["paper"] for k in good],
                    edgecolors=[LIGHT["paper"] if k else colour for k in good],
                    linewidths=[0.6 if k else 1.2 for k in good],
                    zorder=4,
                    gid=f"{gid}{i}",
                )
            tips[f"loss{i}"] = [
                f"{c}: {scientific(a)} FLOPs, loss {b:.4f}"
                for c, a, b in zip(own.index, x, y, strict=True)
            ]
            tips[f"rest{i}"] = [
                f"{c}: {100 * (b / p - 1):+.2f} %"
                for c, b, p in zip(own.index, y, predicted, strict=True)
                if math.isfinite(p)
            ]
            rows += [
                {"what": "cell", "architecture": name, "cell": c, "flops": a, "loss": b,
                 "low": math.nan, "high": math.nan, "predicted": p}
                for c, a, b, p in zip(own.index, x, y, predicted, strict=True)
            ]  # fmt: skip
            for c, answer in zip(
                reach, [a for a in answers if a.architecture == name], strict=True
            ):
                if math.isfinite(answer.loss):
                    left.scatter(
                        [c], [answer.loss], marker="*", s=110, c=colour,
                        edgecolors=LIGHT["paper"], lw=0.8, zorder=6,
                    )  # fmt: skip
        _finish_loss_axes(left, right)
        label_ends(left, [(x.x[-1], x.y[-1], held_words(x.held), c) for x, c in ends])
        drawing = finish(
            figure, "loss", "Loss against training compute with the fitted law", tips, png
        )
    return PlotFigure("loss", drawing, pd.DataFrame(rows), tuple(names))


def _finish_loss_axes(left: Axes, right: Axes) -> None:
    for axes in (left, right):
        log_axis(axes, "x", "scientific", 6 if axes is left else 4)
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.set_xlabel(AXIS_NAMES[FLOPS])
    log_axis(left, "y", "loss", 6)
    left.set_ylabel("loss, nats a token")
    right.set_ylabel("loss above the law, %")
    right.axhline(0, color=LIGHT["faint"], linewidth=0.8, zorder=1)
    reach = max(abs(v) for v in right.get_ylim())
    right.set_ylim(-reach, reach)


def _predicted(fits: Fits, name: str, law: str | None, cells: pd.DataFrame) -> np.ndarray:
    """What a law of the loss says of each cell, NaN where it cannot."""
    for group in (name, ALL):
        if law and group in fits.groups and law in fits.groups[group].loss_laws:
            found = fits.groups[group].loss_laws[law]
            if found.ok:
                answers = [
                    predict_loss({law: found}, [law], {str(k): v for k, v in row.items()})
                    for row in cells.to_dict("records")
                ]
                return np.array([a[1] if a else math.nan for a in answers])
    return np.full(len(cells), math.nan)


RATIO_NAMES = {
    "batch_tokens": "optimal batch",
    "learning_rate": "optimal learning rate",
    "noise_scale_tokens": "gradient noise scale",
}


def comparison_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """MoE over dense: each ratio with its interval; None without both or without any ratio."""
    found = [
        (RATIO_NAMES.get(quantity, quantity), label, ratio)
        for label, ratios in fits.comparison.items()
        for quantity, ratio in ratios.items()
        if ratio.ok and math.isfinite(ratio.ratio)
    ]
    if not found:
        return None
    found.sort(key=lambda f: list(RATIO_NAMES.values()).index(f[0]))
    with settings():
        figure = new_figure(10.2, 0.7 + 0.27 * len(found))
        axes = figure.subplots()
        places = np.arange(len(found))[::-1]
        axes.axvline(1, color=LIGHT["faint"], linewidth=1)
        for place, (_, _, ratio) in zip(places, found, strict=True):
            clear = math.isfinite(ratio.low) and (ratio.low > 1 or ratio.high < 1)
            colour = LIGHT["c1"] if clear else LIGHT["muted"]
            if math.isfinite(ratio.low):
                axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=1.6)
            axes.scatter([ratio.ratio], [place], s=30, c=colour, zorder=3)
        axes.set_yticks(places, [f"{name}, {label}" for name, label, _ in found])
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.7, len(found) - 0.3)
        values = [r.ratio for *_, r in found]
        low = min(*(values), *(r.low for *_, r in found if r.low > min(values) / 5), 0.8)
        high = max(*(values), *(r.high for *_, r in found if r.high < max(values) * 5), 1.25)
        axes.set_xlim(low / 1.15, high * 1.15)
        log_axis(axes, "x", "count", 7)
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel("MoE over dense: 1 is no difference")
        drawing = finish(figure, "comparison", "Ratios of MoE over dense with intervals", {}, png)
    rows = [
        {"quantity": n, "compared": label, "ratio": r.ratio, "low": r.low, "high": r.high}
        for n, label, r in found
    ]
    return PlotFigure("comparison", drawing, pd.DataFrame(rows))
