"""Spending on targets: `python -m benchmarks.target GRIDS --without KEY --seeds S --json FILE`.

Of recorded grids the small cells are searched and the large ones, the targets, are asked for,
under three priors: equal trials a cell against planned spending (`raysweep.search.value`) of the
same FLOPs. Regret is in per cent of the target's lowest smoothed loss, at the grid point nearest to
the recommendation. Intervals are those of both searches, against the smoothed grid's optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import optuna

from benchmarks.entry import make_parser, save, start
from benchmarks.recorded import RecordedGrid, read_grids
from benchmarks.search import grid_search
from raysweep.errors import UserError
from raysweep.scaling.optima.literature import OptimumPrior, flat_prior, literature_prior
from raysweep.scaling.optima.surface import Surface
from raysweep.search.history import TrialHistory
from raysweep.search.value import next_cell

_TOP = 4.0  # targets have at least the largest compute over this
_APART = 2.0  # the small cells, at most the smallest target's over this
_FIRST = 10  # trials of the smallest cell, where nothing is known
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
    """Search the small cells: `trials` each, and more as planned where there is a `budget`."""
    wanted = tuple(g.cell for g in targets)
    history = TrialHistory(prior)
    searches = [
        grid_search(history, grid, trials=trials, seed=seed + 1000 * i)
        for i, grid in enumerate(small)
    ]
    flops = [grid.cell.compute for grid in small]
    cells = [grid.cell for grid in small]
    own = [max(trials, _FIRST), *[trials] * (len(small) - 1)]
    spent = 0.0
    while True:
        had = [search.count for search in searches]
        least = [max(0, mine - h) for mine, h in zip(own, had, strict=True)]
        if budget is None:
            chosen = next((i for i, more in enumerate(least) if more), None)
        else:
            most = [_MOST - h for h in had]
            left = budget - spent
            chosen = next_cell(history.surface(), cells, had, flops, most, least, left, wanted)
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
    parser = make_parser("target", __doc__)
    parser.add_argument("grids", help="results folder (URI), or a Step Law CSV")
    parser.add_argument("--without", action="append", default=[], metavar="KEY")
    parser.add_argument("--trials", default="3,4,6", help="trials a cell, comma-separated")
    parser.add_argument("--priors", default="literature,deepseek,flat")
    parser.add_argument("--seeds", type=int, default=5)
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
            ways = {"uniform": [], "planned": []}
            for seed in range(options.seeds):
                search = partial(spend, small, targets, seed=seed, prior=priors[name])
                alike = search(trials)
                ways["uniform"].append(alike)
                ways["planned"].append(search(1, budget=alike.flops))
            by_seed = {
                way: np.array([run.regrets.mean() for run in runs]) for way, runs in ways.items()
            }
            inside = {
                way: np.concatenate([run.covered for run in runs]) for way, runs in ways.items()
            }
            covered += inside.values()
            apart = by_seed["planned"] - by_seed["uniform"]
            setting = {
                "prior": name,
                "trials": trials,
                **{way: float(regrets.mean()) for way, regrets in by_seed.items()},
                "standard_error": float(apart.std(ddof=1) / np.sqrt(len(apart))),
                **{f"{way}_by_seed": regrets.tolist() for way, regrets in by_seed.items()},
                **{f"covered_{way}": rows.mean(0).tolist() for way, rows in inside.items()},
                "counts": [run.counts for run in ways["planned"]],
            }
            settings.append(setting)
            print(
                f"{name:10} {trials} trials: equal {setting['uniform']:.3f} %, planned "
                f"{setting['planned']:.3f} % (se "
                f"{setting['standard_error']:.3f}); trials {ways['planned'][0].counts}",
                flush=True,
            )
    rate, batch = np.concatenate(covered).mean(0)
    mean = {way: np.mean([s[way] for s in settings]) for way in ("uniform", "planned")}
    ratio = mean["planned"] / mean["uniform"]
    said = {
        "settings": settings,
        "ratio": float(ratio),
        "covered_learning_rate": float(rate),
        "covered_batch": float(batch),
        "n_cells": len(targets),
    }
    print(f"planned / equal {ratio:.2f}; covered: rate {rate:.2f}, batch {batch:.2f}")
    save(options.json, said)


if __name__ == "__main__":
    start(main)
