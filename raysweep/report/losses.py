"""The figures of the loss: against compute with its law and residuals, and dense against MoE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.report.figures import (
    MOST_ARCHITECTURES,
    End,
    PlotFigure,
    draw_cells,
    draw_line,
    draw_star,
    held_words,
    label_ends,
)
from raysweep.report.rows import Mark, draw_rows, rows_height
from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    finish,
    log_axis,
    new_figure,
    settings,
)
from raysweep.report.trends import FLOPS, asked_of, loss_along, loss_fit, names_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.group_loss import predict_loss
from raysweep.scaling.quantities import MEASURED, QUANTITIES
from raysweep.scaling.recommend import Recommendation
from raysweep.text import scientific


def loss_figure(
    fits: Fits, answers: Sequence[Recommendation], laws: Mapping[str, str], *, png: bool = False
) -> PlotFigure | None:
    """Loss at the optimum against compute with its law, and what the law leaves over.

    `laws` names each architecture's law of the loss; None without any loss."""
    cells = fits.cells[fits.cells["loss"].notna()]
    names = [n for n in names_of(fits) if (cells["architecture"] == n).any()][:MOST_ARCHITECTURES]
    if not names:
        return None
    residual = _residuals(fits, names, laws, cells)
    rows: list[dict[str, object]] = []
    tips: dict[str, list[str]] = {}
    with settings():
        figure = new_figure(10.2, 3.6)
        panels = 2 if residual.notna().any() else 1
        axes = figure.subplots(1, panels, width_ratios=(1.7, 1)[:panels], squeeze=False)[0]
        for i, name in enumerate(names):
            own = cells[cells["architecture"] == name]
            x, y = own[FLOPS].to_numpy(float), own["loss"].to_numpy(float)
            full = (own["loss_from"] == "optimum").to_numpy()
            rest = 100 * residual[own.index].to_numpy(float)
            draw_cells(axes[0], x, y, full, i, f"loss{i}")
            tips[f"loss{i}"] = [
                f"{c}: {scientific(a)} FLOPs, loss {b:.4f}"
                for c, a, b in zip(own.index, x, y, strict=True)
            ]
            known = np.isfinite(rest)
            if known.any():
                draw_cells(axes[1], x[known], rest[known], full[known], i, f"rest{i}")
                tips[f"rest{i}"] = [
                    f"{c}: {r:+.2f} %" for c, r in zip(own.index[known], rest[known], strict=True)
                ]
            rows += [
                {"what": "cell", "architecture": name, "cell": c, "flops": a, "loss": b,
                 "low": math.nan, "high": math.nan, "above_law": r / 100}
                for c, a, b, r in zip(own.index, x, y, rest, strict=True)
            ]  # fmt: skip
        ends = []
        for i, name in enumerate(names):
            drawn, more = _draw_law(axes[0], fits, answers, name, i, laws, len(names) == 1)
            ends += drawn
            rows += more
        _finish_loss_axes(axes)
        label_ends(axes[0], ends)
        label = "Loss against training compute with the fitted law"
        drawing = finish(figure, "loss", label, tips, png, names)
    return PlotFigure("loss", drawing, pd.DataFrame(rows), tuple(names))


def _draw_law(
    axes: Axes,
    fits: Fits,
    answers: Sequence[Recommendation],
    name: str,
    index: int,
    laws: Mapping[str, str],
    several: bool,
) -> tuple[list[End], list[dict[str, object]]]:
    """An architecture's law of the loss, and the runs asked about."""
    colour = LIGHT[ARCHITECTURE_COLOURS[index]]
    asked = asked_of(answers, name, fits.groups[name].cells)
    targets = [target for _, target in asked]
    lines = loss_along(fits, name, laws[name], targets, several) if name in laws else []
    rows: list[dict[str, object]] = []
    for k, line in enumerate(lines):
        draw_line(axes, line, colour, first=k == 0)
        rows += [
            {"what": "law", "architecture": name, "cell": line.held, "flops": c, "loss": m,
             "low": lo, "high": hi}
            for c, m, lo, hi in zip(line.x, line.y, line.low, line.high, strict=True)
        ]  # fmt: skip
    for answer, target in asked:
        draw_star(axes, target.inputs[FLOPS], answer.loss, index)
    ends = [(x.x[-1], x.y[-1], held_words(x.held), colour) for x in lines if x.held]
    return ends, rows


def _finish_loss_axes(axes: Sequence[Axes]) -> None:
    for one, most in zip(axes, (6, 4), strict=False):
        log_axis(one, "x", "flops", most)
        one.grid(True)
        one.set_axisbelow(True)
        one.set_xlabel(QUANTITIES[FLOPS].axis)
    log_axis(axes[0], "y", "loss", 6)
    axes[0].set_ylabel("loss, nats a token")
    if len(axes) > 1:
        axes[1].set_ylabel("loss above the law, %")
        axes[1].axhline(0, color=LIGHT["faint"], linewidth=0.8, zorder=1)
        reach = max(*(abs(v) for v in axes[1].get_ylim()), 0.01)
        axes[1].set_ylim(-reach, reach)


def _residuals(
    fits: Fits, names: Sequence[str], laws: Mapping[str, str], cells: pd.DataFrame
) -> pd.Series:
    """Each cell's loss over its law's prediction, less 1; NaN where there is no law."""
    found = pd.Series(math.nan, index=cells.index, dtype=float)
    for name in names:
        key = laws.get(name)
        _, law = loss_fit(fits, name, key)
        if law is None or key is None:
            continue
        own = cells[cells["architecture"] == name]
        for cell, row in zip(own.index, own.to_dict("records"), strict=True):
            answer = predict_loss({key: law}, [key], {str(k): v for k, v in row.items()})
            if answer is not None:
                found[cell] = row["loss"] / answer[1] - 1
    return found


# --- dense against MoE -------------------------------------------------------------------------


def comparison_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """MoE over dense: each ratio with its interval; None without both or without any ratio."""
    order = [QUANTITIES[q].optimal for q in MEASURED]
    found = [
        (QUANTITIES[quantity].optimal, label, ratio)
        for label, ratios in fits.comparison.items()
        for quantity, ratio in ratios.items()
        if ratio.ok and math.isfinite(ratio.ratio)
    ]
    if not found:
        return None
    found.sort(key=lambda f: order.index(f[0]))
    labels = [f"{name}, {label}" for name, label, _ in found]
    marks = [
        Mark(
            row,
            ratio.ratio,
            ratio.low,
            ratio.high,
            "c1" if ratio.low > 1 or ratio.high < 1 else "muted",
            tip=f"{label}: {ratio.ratio:.3g}, {ratio.n_dense} dense and {ratio.n_moe} MoE cells",
        )
        for row, (label, (*_, ratio)) in enumerate(zip(labels, found, strict=True))
    ]
    with settings():
        figure = new_figure(10.2, rows_height(len(found)))
        axes = figure.subplots()
        tips = draw_rows(axes, labels, marks, 1.0, "ratios")
        log_axis(axes, "x", "count", 7)
        axes.set_xlabel("MoE over dense: 1 is no difference")
        drawing = finish(figure, "comparison", "Ratios of MoE over dense with intervals", tips, png)
    rows = [
        {"quantity": n, "compared": label, "ratio": r.ratio, "low": r.low, "high": r.high}
        for n, label, r in found
    ]
    return PlotFigure("comparison", drawing, pd.DataFrame(rows))
