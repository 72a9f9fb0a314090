"""The figures that set kinds of models side by side: optima and noise against loss, and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.report.figures import (
    MOST_ARCHITECTURES,
    PlotFigure,
    draw_cells,
)
from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    finish,
    log_axis,
    new_figure,
    settings,
)
from raysweep.report.trends import FLOPS, names_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.groups import Group
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.quantities import MEASURED, QUANTITIES

LOADS = {
    "expert_load_entropy": "entropy of the load",
    "expert_load_max_over_mean": "busiest expert, times the mean",
    "router_confidence": "router confidence",
}


def law_of_loss(group: Group, quantity: str) -> PowerLaw:
    """A group's power law of `quantity` in the loss."""
    if quantity == "learning_rate":
        return group.laws["learning_rate(loss)"]
    return (group.critical_batch if quantity == "batch_tokens" else group.noise_scale).law


def noise_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """Optimal learning rate, optimal batch and measured noise scale of each cell against its loss,
    with their laws; None where no cell has an optimum or a noise scale."""
    names = names_of(fits)[:MOST_ARCHITECTURES]
    table = fits.cells.assign(
        noise_scale_tokens=fits.noise_scale["noise_scale_tokens"],
        full=(fits.cells["status"] == "interior").to_numpy(),
    )
    table = table[table["loss"].notna() & table["architecture"].isin(names)]
    shown = [q for q in MEASURED if table[q].notna().any()]
    if not shown or not len(table):
        return None
    rows: list[dict[str, object]] = []
    tips: dict[str, list[str]] = {}
    with settings():
        figure = new_figure(10.2 if len(shown) > 2 else 7.4, 3.3)
        grid = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, quantity in zip(grid, shown, strict=True):
            log_sd = fits.noise_scale["log_sd"] if quantity == "noise_scale_tokens" else None
            for i, name in enumerate(names):
                own = table[(table["architecture"] == name) & table[quantity].notna()]
                if not len(own):
                    continue
                law = law_of_loss(fits.groups[name], quantity)
                rows += _draw_one(axes, own, quantity, law, log_sd, i, tips)
            _finish_noise_axes(axes, quantity, table["loss"].to_numpy(float))
        label = "Optimal learning rate, optimal batch and gradient noise scale against loss"
        drawing = finish(figure, "noise", label, tips, png, names)
    return PlotFigure("noise", drawing, pd.DataFrame(rows), tuple(shown))


def _draw_one(
    axes: Axes,
    own: pd.DataFrame,
    quantity: str,
    law: PowerLaw,
    log_sd: pd.Series | None,
    index: int,
    tips: dict[str, list[str]],
) -> list[dict[str, object]]:
    """One architecture's cells and law in one panel."""
    colour = LIGHT[ARCHITECTURE_COLOURS[index]]
    x, y = own["loss"].to_numpy(float), own[quantity].to_numpy(float)
    measured = log_sd is not None
    full = np.ones(len(own), bool) if measured else own["full"].to_numpy(bool)
    write = QUANTITIES[quantity].write
    if log_sd is not None:
        half = 1.96 * log_sd[own.index].to_numpy(float)
        bars = np.stack([y * (1 - np.exp(-half)), y * np.expm1(half)])
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.7)
    gid = f"{quantity}-{index}"
    draw_cells(axes, x, y, full, index, gid)
    tips[gid] = [
        f"{c}: loss {a:.4f}, {QUANTITIES[quantity].optimal} {write(b)}"
        for c, a, b in zip(own.index, x, y, strict=True)
    ]
    name = str(own["architecture"].iloc[0])
    rows: list[dict[str, object]] = [
        {"what": "cell", "architecture": name, "cell": c, "quantity": quantity, "loss": a,
         "value": b, "low": math.nan, "high": math.nan}
        for c, a, b in zip(own.index, x, y, strict=True)
    ]  # fmt: skip
    if law.ok and np.ptp(np.log(x)) > 1e-3:
        at = np.geomspace(x.min(), x.max(), 21)
        line = law.predict({"loss": at})
        low, high = law.interval({"loss": at}, new_cell=False)
        axes.plot(at, line, color=colour, linewidth=1.4, zorder=2)
        if np.isfinite(low).all():
            axes.fill_between(at, low, high, color=colour, alpha=0.12, lw=0, zorder=1)
        rows += [
            {"what": "law", "architecture": name, "cell": "", "quantity": quantity, "loss": a,
             "value": b, "low": lo, "high": hi}
            for a, b, lo, hi in zip(at, line, low, high, strict=True)
        ]  # fmt: skip
    return rows


def _finish_noise_axes(axes: Axes, quantity: str, losses: np.ndarray) -> None:
    """Loss falls to the right; bands are seen three times beyond what was measured."""
    dots = np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in axes.collections
                           if (c.get_gid() or "").startswith(quantity)])  # fmt: skip
    axes.set_ylim(dots.min() / 3, dots.max() * 3)
    margin = max((losses.max() / losses.min()) ** 0.06, 1.01)
    axes.set_xlim(losses.min() / margin, losses.max() * margin)
    log_axis(axes, "x", "loss", 5)
    axes.invert_xaxis()
    log_axis(axes, "y", QUANTITIES[quantity].style, 5)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.set_xlabel(QUANTITIES["loss"].axis)
    axes.set_ylabel(QUANTITIES[quantity].axis)


def load_figure(fits: Fits, *, png: bool = False) -> PlotFigure | None:
    """Expert load and router confidence of each MoE cell against compute; None where not
    measured."""
    load = fits.expert_load
    shown = [c for c in LOADS if len(load) and load[c].notna().any()]
    if not shown:
        return None
    table = load.join(fits.cells[["architecture", FLOPS, "experts", "top_k"]])
    names = names_of(fits)
    tips: dict[str, list[str]] = {}
    with settings():
        figure = new_figure(10.2 if len(shown) > 2 else 7.4, 2.7)
        grid = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, column in zip(grid, shown, strict=True):
            for name, own in table.groupby("architecture", sort=False):
                index = names.index(str(name)) % MOST_ARCHITECTURES
                colour = LIGHT[ARCHITECTURE_COLOURS[index]]
                x, y = own[FLOPS].to_numpy(float), own[column].to_numpy(float)
                sd = own[f"{column}_sd"].fillna(0).to_numpy(float)
                axes.errorbar(x, y, yerr=sd, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.7)
                gid = f"{column}-{index}"
                draw_cells(axes, x, y, np.ones(len(own), bool), index, gid)
                tips[gid] = [f"{c}: {v:.3g}" for c, v in zip(own.index, y, strict=True)]
            for even in _even(table, column):
                axes.axhline(even, color=LIGHT["faint"], linewidth=1, zorder=1)
            log_axis(axes, "x", "flops", 4)
            axes.margins(y=0.15)
            axes.grid(True)
            axes.set_axisbelow(True)
            axes.set_xlabel(QUANTITIES[FLOPS].axis)
            axes.set_ylabel(LOADS[column])
        label = "Load of experts and confidence of routers of each cell against compute"
        drawn = [n for n in names if (table["architecture"] == n).any()]
        drawing = finish(figure, "load", label, tips, png, _keyed(names, drawn))
    return PlotFigure("load", drawing, table.reset_index(), tuple(shown))


def _even(table: pd.DataFrame, column: str) -> list[float]:
    """What routing at random would show: even load, and K/E for the chosen experts."""
    if column == "router_confidence":
        return sorted({float(v) for v in table["top_k"] / table["experts"]})
    return [1.0]


def _keyed(names: Sequence[str], drawn: Sequence[str]) -> Sequence[str]:
    """Names up to the last one drawn: a key gives colours by place."""
    return names[: max(names.index(n) for n in drawn) + 1]
