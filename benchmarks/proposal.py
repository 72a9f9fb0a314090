"""How long a proposal takes: `python -m benchmarks.proposal [--cells 60] [--trials 1000]`.

Each ask follows a new outcome in another cell, so the surface model is fitted anew every time. The
peer, in the same run, is Optuna's TPE on a study of as many trials as one cell has. Times are of
this process's CPU: other work on the machine does not count.
"""

from __future__ import annotations

import os
import time

import numpy as np
import optuna

from benchmarks.entry import make_parser, save, start
from benchmarks.search import CellSearch
from benchmarks.simulation import loss_of
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.study.shape import RunSize

RATES, BATCHES = (1e-5, 1e-1), (0, 14)
LENGTH = 2048


def searches_of(strategy: str, cells: list[RunSize], trials: int) -> list[CellSearch]:
    """A search a cell with `trials` random trials altogether."""
    rng, history, searches = np.random.default_rng(0), TrialHistory(), []
    for i, cell in enumerate(cells):

        def answer(point: np.ndarray, cell: RunSize = cell) -> tuple[np.ndarray, float]:
            rate, batch = np.exp(point)
            return point, loss_of(cell, rate, batch, rng.normal())

        search = CellSearch(
            history, cell, (RATES, BATCHES), LENGTH, answer, strategy=strategy, trials=12, seed=0
        )
        for _ in range(trials * (i + 1) // len(cells) - trials * i // len(cells)):
            rate = float(np.exp(rng.uniform(*np.log(RATES))))
            log2 = int(rng.integers(BATCHES[0], BATCHES[1] + 1))
            value = loss_of(cell, rate, 2.0**log2 * LENGTH, rng.normal())
            params = {LEARNING_RATE: rate, LOG2_BATCH: log2}
            search.study.add_trial(
                optuna.create_trial(params=params, distributions=search.space, value=value)
            )
        searches.append(search)
    return searches


def times(strategy: str, cells: list[RunSize], trials: int, asks: int) -> np.ndarray:
    """Seconds of each ask."""
    searches, found = searches_of(strategy, cells, trials), []
    for i in range(asks + 1):
        search = searches[i % len(cells)]
        begun = time.process_time()
        trial = search.study.ask(search.space)
        found.append(time.process_time() - begun)
        search.finish(trial)
    return np.array(found[1:])  # the first fits from nothing


def main() -> None:
    parser = make_parser("proposal", __doc__)
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--asks", type=int, default=40)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    cells = [
        RunSize(
            name=f"c{i}",
            params_active_non_embedding=2e7 * 1.12**i,
            tokens=4e8 * 1.12**i * (1 + i % 3),
        )
        for i in range(args.cells)
    ]
    answer = {}
    for strategy in ("ladder", "tpe"):
        ms = 1e3 * times(strategy, cells, args.trials, args.asks)
        low, middle, high = np.percentile(ms, [5, 50, 95])
        answer[strategy] = {"median_ms": middle, "p5_ms": low, "p95_ms": high, "max_ms": ms.max()}
        print(
            f"{strategy}: median {middle:.1f} ms, 5-95 % {low:.1f}-{high:.1f}, max {ms.max():.1f} "
            f"(n={len(ms)}, {args.cells} cells, {args.trials} trials)"
        )
    print(f"cores {os.cpu_count()}, numpy {np.__version__}, optuna {optuna.__version__}")
    save(args.json, answer)


if __name__ == "__main__":
    start(main)
