"""Spending on targets: `python -m benchmarks.target GRIDS --without KEY --seeds S --json FILE`.

Of recorded grids the small cells are searched and the large ones, the targets, are asked for:
equal trials a cell against planned spending (`raysweep.search.value`) of the same FLOPs, under
three priors. Regret is in per cent of the target's lowest smoothed loss, at the grid point nearest
to the recommendation. Intervals are those of both searches, against the smoothed grid's optimum.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from benchmarks.recorded import RecordedGrid, read_grids
from benchmarks.search import grid_search
from raysweep.errors import UserError
from raysweep.scaling.optima.literature import OptimumPrior, flat_prior, literature_prior
from raysweep.scaling.optima.surface import Surface
from raysweep.search.history import TrialHistory
from raysweep.search.value import next_cell

_TOP = 4.0  # targets have at least the largest compute over this
_APART = 2.0  # the small cells, at most the smallest target's over this
_FIRST = 10  # trials of the smallest cell, where nothing is known, with equal trials
_FIRST_PLANNED = 6  # and before planning
_MOST = 24  # trials a cell that planning may give


@dataclass(frozen=True)
class Judged:
    """What a search of the small cells says of the targets."""

    regrets: np.ndarray  # [targets], per cent
    covered: np.ndarray  # [targets, 2] bool: rate, batch
    flops: float
    counts: tuple[int, ...]


def split(grids: Sequence[RecordedGrid]) -> tuple[list[RecordedGrid], list[RecordedGrid]]:
    """Small cells and targets.

    Raises:
        UserError: fewer than three small cells.
    """
    top = max(grid.cell.compute for grid in grids)
    targets = [grid for grid in grids if grid.cell.compute >= top / _TOP]
    edge = min(grid.cell.compute for grid in targets)
    small = [grid for grid in grids if grid.cell.compute <= edge / _APART]
    if len(small) < 3:
        raise UserError("fewer than three cells lie far enough below the largest ones")
    return small, targets


def spend(
    small: Sequence[RecordedGrid],
    targets: Sequence[RecordedGrid],
    trials: int,
    seed: int,
    prior: OptimumPrior,
    budget: float | None = None,
) -> Judged:
    """Search the small cells: `trials` each, or with a `budget` of FLOPs as planned."""
    history = TrialHistory(prior)
    searches = [
        grid_search(history, grid, trials=trials, seed=seed + 1000 * i)
        for i, grid in enumerate(small)
    ]
    flops = [grid.cell.compute for grid in small]
    spent = 0.0
    for i, search in enumerate(searches):
        first = max(trials, _FIRST) if budget is None else _FIRST_PLANNED
        for _ in range(first if i == 0 else trials):
            search.run()
            spent += flops[i]
    cells, wanted = [g.cell for g in small], tuple(g.cell for g in targets)
    while budget is not None:
        had = [search.count for search in searches]
        most = [_MOST - count for count in had]
        chosen = next_cell(history.surface(), cells, had, flops, most, budget - spent, wanted)
        if chosen is None:
            break
        searches[chosen].run()
        spent += flops[chosen]
    counts = tuple(search.count for search in searches)
    return judge(history.surface(), targets, spent, counts)


def judge(
    surface: Surface, targets: Sequence[RecordedGrid], flops: float, counts: tuple[int, ...]
) -> Judged:
    """The surface's answers for the targets against their grids."""
    regrets, covered = [], []
    for grid in targets:
        found = surface.optimum(grid.cell)
        low, high = found.interval().T
        best = grid.point[int(grid.denoised_gap.argmin())]
        regrets.append(100 * grid.denoised_gap[grid.nearest(found.mean)])
        covered.append((low <= best) & (best <= high))
    return Judged(np.array(regrets), np.array(covered), flops, counts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.target", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("grids", help="results folder (URI), or a Step Law CSV")
    parser.add_argument("--without", action="append", default=[], metavar="KEY")
    parser.add_argument("--trials", default="3,4,6", help="trials a cell, comma-separated")
    parser.add_argument("--priors", default="literature,deepseek,flat")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    small, targets = split(read_grids(options.grids))
    print(f"{len(small)} small cells, {len(targets)} targets, {options.seeds} seeds")
    priors = {
        "literature": literature_prior(options.without),
        "deepseek": literature_prior(trust=["deepseek"]),
        "flat": flat_prior(),
    }
    settings, covered = [], []
    for name in options.priors.split(","):
        for trials in map(int, options.trials.split(",")):
            pairs = []
            for seed in range(options.seeds):
                alike = spend(small, targets, trials, seed, priors[name])
                planned = spend(small, targets, 2, seed, priors[name], alike.flops)
                pairs.append((alike, planned))
            uniform, active = (
                np.array([pair[way].regrets.mean() for pair in pairs]) for way in (0, 1)
            )
            inside = [np.concatenate([pair[way].covered for pair in pairs]) for way in (0, 1)]
            covered += inside
            error = float((active - uniform).std(ddof=1) / np.sqrt(len(pairs)))
            setting = {
                "prior": name,
                "trials": trials,
                "uniform": float(uniform.mean()),
                "planned": float(active.mean()),
                "standard_error": error,
                "uniform_by_seed": uniform.tolist(),
                "planned_by_seed": active.tolist(),
                "covered_uniform": inside[0].mean(0).tolist(),
                "covered_planned": inside[1].mean(0).tolist(),
                "counts": [pair[1].counts for pair in pairs],
            }
            settings.append(setting)
            print(
                f"{name:10} {trials} trials: equal {setting['uniform']:.3f} %, planned "
                f"{setting['planned']:.3f} % (se {error:.3f}); covered "
                f"{np.mean(inside[0], 0).round(2)} {np.mean(inside[1], 0).round(2)}; trials "
                f"{pairs[0][1].counts}",
                flush=True,
            )
    rate, batch = np.concatenate(covered).mean(0)
    ratio = np.mean([s["planned"] for s in settings]) / np.mean([s["uniform"] for s in settings])
    said = {
        "settings": settings,
        "ratio": float(ratio),
        "covered_learning_rate": float(rate),
        "covered_batch": float(batch),
        "n_cells": len(targets),
    }
    print(f"planned / equal {ratio:.2f}; covered: rate {rate:.2f}, batch {batch:.2f}")
    if options.json:
        options.json.write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
