"""How to spend: the compute-optimal split of a budget between parameters and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysweep.report.figure import Axis, Line, Look, Panel, PlotFigure, Points, Series, looks
from raysweep.report.laws import FLOPS, names_of
from raysweep.scaling.compute.allocation import COUNT_NAMES, Allocation
from raysweep.scaling.compute.budgets import cost_of, routing_of, splitting
from raysweep.scaling.compute.isoflop import Parabola, isoflop
from raysweep.scaling.fits import Fits
from raysweep.scaling.loss.data import LossData, held_budgets
from raysweep.scaling.loss.model import LossModel
from raysweep.text import scientific, short

STEPS, AHEAD = 7, 10.0
"""Budgets at which the best split is told: from the smallest cell's to so many times the
largest's."""

SLICES, WINDOW, CURVE = 4, 12.0, 41
"""Budgets at which the law is cut where none was held; to either side of the best size."""


@dataclass(frozen=True)
class Splits:
    """The best splits by architecture, where they are determined; and why not, elsewhere."""

    found: dict[str, list[Allocation]]
    missing: list[tuple[str, str]]


def splits(fits: Fits) -> Splits:
    """The compute-optimal split of budgets from the smallest cell's to beyond the largest's."""
    found: dict[str, list[Allocation]] = {}
    whys: dict[str, list[str]] = {}
    if not len(fits.cells):
        return Splits({}, [])
    flops = fits.cells[FLOPS]
    budgets = np.geomspace(float(flops.min()), AHEAD * float(flops.max()), STEPS)
    for name, rows in fits.split([float(b) for b in budgets]).items():
        if any(a.ok for a in rows):
            found[name] = rows
        else:
            whys.setdefault(rows[0].why, []).append(name)
    missing = [(f"split of a budget for {', '.join(n)}", why) for why, n in whys.items()]
    return Splits(found, missing)


def split_figure(fits: Fits, told: Splits) -> PlotFigure | None:
    """Loss against size at fixed budgets, and the best N and D against compute."""
    names = [n for n in names_of(fits) if n in told.found]
    if not names:
        return None
    look = looks(fits.architectures)
    cuts: list[Series] = []
    best: dict[str, list[Series]] = {"params": [], "tokens": []}
    for name in names:
        ok = [a for a in told.found[name] if a.ok]
        x = np.array([a.flops for a in ok])
        for quantity, series in best.items():
            y, low, high = np.array(
                [(getattr(a, quantity), *a.intervals.get(quantity, (math.nan,) * 2)) for a in ok]
            ).T
            series.append(Line(f"{name}, law", x, y, look[name].colour, low, high))
        model = splitting(fits.loss_model(name))
        data = LossData.from_cells(fits.cells_of(name))
        level = held_budgets(data.flops)
        inside = _parabolas(model, data) if level is not None else []
        cuts += _cuts(fits, name, model, data, ok, level, inside, look[name])
        for quantity, series in best.items() if inside else ():
            x, y = np.array([(p.flops, getattr(p, quantity)) for p in inside]).T
            series.append(Points(f"{name}, parabolas", x, y, look[name].colour, "P", size=46))
    count = "N, " + COUNT_NAMES[told.found[names[0]][0].count]
    size = Axis(count, "params")
    panels = (
        Panel(size, Axis.of("loss"), tuple(cuts)),
        Panel(Axis.of(FLOPS), Axis(f"best {count}", "params"), tuple(best["params"])),
        Panel(Axis.of(FLOPS), Axis("best D, tokens", "tokens"), tuple(best["tokens"])),
    )
    return PlotFigure(
        "budgets",
        "Loss against size at fixed budgets, and the best size and tokens of a budget",
        panels,
        tuple(names),
        height=2.8,
        ratios=(1.4, 1, 1),
    )


def _cuts(
    fits: Fits,
    name: str,
    model: LossModel,
    data: LossData,
    ok: Sequence[Allocation],
    level: np.ndarray | None,
    parabolas: Sequence[Parabola],
    look: Look,
) -> list[Series]:
    """The law along fixed budgets: those that were held, with their runs and the parabola through
    them, else a few."""
    assert model.law is not None
    params = data.inputs(model.law)[0]["params"]
    cost = cost_of(model, fits.cells_of(name))
    flops = data.flops
    if level is not None:
        budgets = [float(flops[level == k].mean()) for k in range(level.max() + 1)]
    else:
        budgets = [float(v) for v in np.geomspace(flops.min(), flops.max(), SLICES)]
    best = np.log([[a.flops, a.params] for a in ok]).T
    routing = routing_of(fits.cells_of(name))
    series: list[Series] = []
    for k, budget in enumerate(budgets[:: max(1, len(budgets) // 8)]):
        if level is not None:
            own = params[np.isclose(flops, budget, rtol=0.2)]
            n = np.geomspace(own.min(), own.max(), CURVE)
        else:
            middle = math.exp(float(np.interp(math.log(budget), *best)))
            n = np.geomspace(middle / WINDOW, middle * WINDOW, CURVE)
        columns = {"params": n, "tokens": budget / cost(n)}
        columns |= {key: np.full_like(n, v) for key, v in routing.items()}
        y = model.predict_mean({**columns, "flops": np.full_like(n, budget)})[0]
        end = f"{scientific(budget, 2)} FLOPs" if k % 2 == 0 else scientific(budget, 2)
        series.append(Line(f"{name}, law", n, y, look.colour, dashed=level is None, end=end))
    if level is not None:
        for one in parabolas:
            own = params[np.isclose(flops, one.flops, rtol=0.2)]
            n = np.geomspace(own.min(), own.max(), CURVE)
            series.append(Line(f"{name}, parabola", n, one.at(n), look.colour, dashed=True))
        tips = [
            f"{scientific(c)} FLOPs: N {short(n)}, loss {y:.4f}"
            for c, n, y in zip(flops, params, data.loss, strict=True)
        ]
        series.append(Points(f"{name}, runs", params, data.loss, *look, tips=tips, size=12))
    return series


def _parabolas(model: LossModel, data: LossData) -> list[Parabola]:
    """Those of held budgets that have a minimum among their runs."""
    assert model.law is not None
    params = data.inputs(model.law)[0]["params"]
    return isoflop(params, data.columns["tokens"], data.loss, data.flops).inside


def split_rows(told: Splits) -> list[dict[str, Any]]:
    """The splits of each architecture: `told` holds (estimate, style) of N, D, loss, exponent."""
    styles = {"params": "params", "tokens": "tokens", "loss": "loss", "exponent": "number"}
    return [
        {
            "name": name,
            "flops": scientific(a.flops),
            "told": [(a.estimate(q), style) for q, style in styles.items()],
            "outside": "outside the cells" if a.status == "outside" else "",
        }
        for name, allocations in told.found.items()
        for a in allocations
        if a.ok
    ]
