"""The figure of held-out predictions: what laws said of cells that they had not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from raysweep.report.figures import PlotFigure
from raysweep.report.rows import Mark, draw_rows, rows_height, rows_units
from raysweep.report.style import ARCHITECTURE_COLOURS, finish, log_axis, new_figure, settings
from raysweep.report.trends import names_of
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.group_loss import RESAMPLED
from raysweep.scaling.quantities import QUANTITIES, SEARCHED


def heldout_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """Predicted over measured, less 1, of the cells each law was kept from; None without any.

    Left the loss of the largest scale, by the laws that predict it best; right the optimal learning
    rate and batch of the larger cells, by laws of the smaller ones."""
    colours = _colours(fits)
    losses, loss_rows = _losses(fits, colours)
    optima, optima_rows = _optima(fits, colours)
    panels = [p for p in (losses, optima) if p[0]]
    if not panels:
        return None
    tips: dict[str, list[str]] = {}
    with settings():
        room = max(sum(rows_units(*panel)) for panel in panels)
        figure = new_figure(10.2, rows_height(room))
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            labels, marks = panel
            if panel is losses:
                tips |= draw_rows(axes, labels, marks, 0.0, "unseen-loss", room)
                axes.set_xlabel("predicted loss above the measured one, %")
            else:
                tips |= draw_rows(axes, labels, marks, 1.0, "unseen-optima", room)
                log_axis(axes, "x", "count", 6)
                axes.set_xlabel("predicted optimum over the measured one")
        label = "Predictions of held-out cells over what was measured, with 95 % intervals"
        drawing = finish(figure, "heldout", label, tips, png, names_of(fits))
    return PlotFigure("heldout", drawing, pd.DataFrame(loss_rows + optima_rows))


def _colours(fits: Fits) -> dict[str, str]:
    found = dict(zip(names_of(fits), ARCHITECTURE_COLOURS, strict=False))
    return {**found, ALL: "muted"}


Panel = tuple[list[str], list[Mark]]


def _losses(fits: Fits, colours: Mapping[str, str]) -> tuple[Panel, list[dict[str, object]]]:
    labels: list[str] = []
    marks: list[Mark] = []
    rows: list[dict[str, object]] = []
    for name in (n for n in colours if n in fits.groups):
        group = fits.groups[name]
        for key in group.loss_order()[:RESAMPLED]:
            unseen = group.loss_checks[key].unseen
            if not unseen:
                continue
            for u in unseen:
                value, low, high = (
                    100 * (v / u.observed - 1) for v in (u.predicted, u.low, u.high)
                )
                tip = f"{u.cell}: predicted {u.predicted:.4f}, measured {u.observed:.4f}"
                tip += f" ({value:+.2f} %)"
                marks.append(Mark(len(labels), value, low, high, colours[name], tip=tip))
                rows.append(
                    {"what": "loss", "architecture": name, "law": key, "cell": u.cell,
                     "measured": u.observed, "predicted": u.predicted, "low": u.low, "high": u.high}
                )  # fmt: skip
            labels.append(f"{'all' if name == ALL else name}, {key.replace('_', ' ')}")
    return (labels, marks), rows


def _optima(fits: Fits, colours: Mapping[str, str]) -> tuple[Panel, list[dict[str, object]]]:
    labels: list[str] = []
    marks: list[Mark] = []
    rows: list[dict[str, object]] = []
    optima = fits.optima[fits.method]
    for name in (n for n in colours if n in fits.groups and n != ALL):
        gap = fits.groups[name].held_out
        for target in SEARCHED if gap is not None else ():
            assert gap is not None
            write = QUANTITIES[target].write
            for cell, predicted in gap.predicted.items():
                optimum = optima[cell]
                value, low, high = predicted[target]
                measured = float(getattr(optimum, target))
                marks.append(
                    Mark(
                        len(labels),
                        value / measured,
                        low / measured if math.isfinite(low) else math.nan,
                        high / measured if math.isfinite(high) else math.nan,
                        colours[name],
                        optimum.interior,
                        f"{cell}: predicted {write(value)}, measured {write(measured)} "
                        f"({optimum.status})",
                    )
                )
                rows.append(
                    {"what": target, "architecture": name, "law": "", "cell": cell,
                     "measured": measured, "predicted": value, "low": low, "high": high,
                     "status": optimum.status}
                )  # fmt: skip
            labels.append(f"{name}, {QUANTITIES[target].star}")
    return (labels, marks), rows
