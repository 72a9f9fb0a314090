"""Replays search strategies on recorded grids: `python -m benchmarks.replay --results URI`.

A trial returns the recorded loss of the nearest grid point, so strategies are compared without
training anything. Cells come in order of compute, each strategy sees only what it asked for, and
the first cell, where nothing is known, gets 10 trials and is shown apart. Gaps are in per cent of a
cell's lowest recorded loss (or of its lowest smoothed one: "denoised"), at the grid point nearest
to what is judged:

    found                 the best trial asked for
    recommended           what the strategy would recommend once all cells are searched: the surface
                          model's optimum for "ladder", the best trial for the others
    recommended, denoised the same, against a smooth fit of the whole grid
    laws                  power laws fitted to those trials alone, with no correction for the cell:
                          the surface model's for "ladder", a regression on the best trials for
                          others
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import optuna

from benchmarks.entry import make_parser, save, start
from benchmarks.recorded import RecordedGrid, read_grids
from benchmarks.search import grid_search
from raysweep.scaling.optima.literature import OptimumPrior, flat_prior, literature_prior
from raysweep.scaling.optima.model import LINEAR, Design
from raysweep.search.history import TrialHistory
from raysweep.search.strategies import STRATEGIES
from raysweep.study.shape import RunSize

FIRST_CELL_TRIALS = 10
MEASURES = ("found", "recommended", "recommended_denoised", "laws")


@dataclass(frozen=True)
class CellGaps:
    """The gaps of one cell in one replay, in per cent."""

    cell: str
    found: float
    recommended: float
    recommended_denoised: float
    laws: float


def replay(
    grids: Sequence[RecordedGrid],
    strategy: str,
    trials: int,
    seed: int,
    prior: OptimumPrior | None = None,
) -> list[CellGaps]:
    """One replay of one strategy over all cells, smallest first."""
    history = TrialHistory(prior)
    budgets = [max(trials, FIRST_CELL_TRIALS), *[trials] * (len(grids) - 1)]
    # A study knows its cells before it starts.
    searches = [
        grid_search(history, grid, strategy=strategy, trials=budget, seed=seed + 1000 * i)
        for i, (grid, budget) in enumerate(zip(grids, budgets, strict=True))
    ]
    asked = [
        [grid.nearest(search.run()[0]) for _ in range(budget)]
        for grid, search, budget in zip(grids, searches, budgets, strict=True)
    ]
    best = [
        min(rows, key=lambda row: grid.gap[row]) for rows, grid in zip(asked, grids, strict=True)
    ]
    if strategy == "ladder":
        surface = history.surface()
        recommended = [grid.nearest(surface.optimum(grid.cell).mean) for grid in grids]
        by_law = [grid.nearest(surface.law(grid.cell)) for grid in grids]
    else:
        recommended = best
        points = np.array([grid.point[row] for grid, row in zip(grids, best, strict=True)])
        predicted = regress([grid.cell for grid in grids], points)
        by_law = [grid.nearest(point) for grid, point in zip(grids, predicted, strict=True)]
    return [
        CellGaps(
            cell=grid.cell.name,
            found=100 * float(grid.gap[best[i]]),
            recommended=100 * float(grid.gap[recommended[i]]),
            recommended_denoised=100 * float(grid.denoised_gap[recommended[i]]),
            laws=100 * float(grid.gap[by_law[i]]),
        )
        for i, grid in enumerate(grids)
    ]


def add_prior_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose the prior of the optimum's law."""
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="KEY",
        help="leave a published law out of the prior: that of the replayed data, say (repeatable)",
    )
    parser.add_argument("--prior", choices=("literature", "flat"), default="literature")
    parser.add_argument(
        "--rate-off", type=float, default=1.0, help="factor on every learning rate of the prior"
    )


def prior_of(options: argparse.Namespace) -> OptimumPrior:
    """The prior that the arguments of `add_prior_arguments` name."""
    chosen = flat_prior() if options.prior == "flat" else literature_prior(options.without)
    return chosen.shifted(float(np.log(options.rate_off)))


def regress(cells: Sequence[RunSize], points: np.ndarray) -> np.ndarray:
    """Least-squares power laws through points [cells, 2], read back at the cells."""
    design = Design.of(cells).matrix(cells)[:, :LINEAR]
    return design @ np.linalg.lstsq(design, points, rcond=None)[0]


def summarise(runs: Sequence[Sequence[CellGaps]]) -> dict[str, dict[str, float]]:
    """Mean, median, 90th percentile and max of each gap over cells and seeds, first cell apart."""
    table = {}
    for measure in MEASURES:
        gaps = np.array([[getattr(cell, measure) for cell in run] for run in runs])
        rest = gaps[:, 1:] if gaps.shape[1] > 1 else gaps
        table[measure] = {
            "mean": float(rest.mean()),
            "median": float(np.median(rest)),
            "p90": float(np.quantile(rest, 0.9)),
            "max": float(rest.max()),
            "first_cell_mean": float(gaps[:, 0].mean()),
        }
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints a table and writes JSON where asked."""
    parser = make_parser("replay", __doc__)
    parser.add_argument("--results", required=True, help="results folder (URI), or a Step Law CSV")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma-separated")
    parser.add_argument("--trials", default="3,4,6", help="trials a cell, comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    add_prior_arguments(parser)
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    grids = read_grids(options.results)
    prior = prior_of(options)
    runs = sum(len(grid.loss) for grid in grids)
    print(f"{options.results}: {len(grids)} cells, {runs} runs, {options.seeds} seeds")
    print(f"gaps in % over all cells but the first ({grids[0].cell.name}, 10 trials: last column)")
    print(
        f"{'strategy':16} {'trials':>6}  {'gap':21} "
        + " ".join(f"{name:>7}" for name in ("mean", "median", "p90", "max", "first"))
    )
    report = []
    for strategy in options.strategies.split(","):
        for trials in map(int, options.trials.split(",")):
            replays = [
                replay(grids, strategy, trials, seed, prior) for seed in range(options.seeds)
            ]
            table = summarise(replays)
            for measure, row in table.items():
                numbers = " ".join(f"{value:7.3f}" for value in row.values())
                print(f"{strategy:16} {trials:6}  {measure:21} {numbers}", flush=True)
            report.append(
                {
                    "strategy": strategy,
                    "trials": trials,
                    "summary": table,
                    "replays": [[asdict(cell) for cell in run] for run in replays],
                }
            )
    said = {name: getattr(options, name) for name in ("results", "prior", "without", "rate_off")}
    save(options.json, said | {"seeds": options.seeds, "runs": report})


if __name__ == "__main__":
    start(main)
