"""How long a proposal takes: `python -m benchmarks.proposal [--cells 60] [--trials 1000]`.

Each ask follows a new outcome in another cell, so the surface model is fitted anew every time. The
peer, in the same run, is Optuna's TPE on a study of as many trials as one cell has. Times are of
this process's CPU: other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import optuna

from raysweep.search.history import TrialHistory
from raysweep.search.strategies import make_sampler, search_space
from raysweep.study.shape import RunSize

RATES, BATCHES = (1e-5, 1e-1), (0, 14)
LENGTH = 2048


def loss_of(cell: RunSize, rate: float, log2: int, rng: np.random.Generator) -> float:
    """A valley about Step Law's optimum, with 0.1 % of noise."""
    u = np.log(rate / (1.79 * cell.params_active_non_embedding**-0.713 * cell.tokens**0.307))
    v = np.log(2.0**log2 * LENGTH / (0.58 * cell.tokens**0.571))
    base = 1.7 + 400 * cell.params_active_non_embedding**-0.35 + 400 * cell.tokens**-0.28
    return float(base * np.exp(0.02 * u**2 + 0.01 * v**2 + 1e-3 * rng.normal()))


def studies_of(strategy: str, cells: list[RunSize], trials: int) -> list[optuna.Study]:
    """A study a cell with `trials` random trials altogether."""
    rng, history, studies = np.random.default_rng(0), TrialHistory(), []
    space = search_space(RATES, BATCHES)
    for i, cell in enumerate(cells):
        sampler = make_sampler(
            strategy,
            cell=cell,
            history=history,
            learning_rate=RATES,
            log2_batch=BATCHES,
            sequence_length=LENGTH,
            trials=12,
            seed=0,
        )
        study = optuna.create_study(sampler=sampler)
        history.register(cell, study, sequence_length=LENGTH)
        for _ in range(trials * (i + 1) // len(cells) - trials * i // len(cells)):
            rate = float(np.exp(rng.uniform(*np.log(RATES))))
            log2 = int(rng.integers(BATCHES[0], BATCHES[1] + 1))
            params = {"learning_rate": rate, "log2_batch_sequences": log2}
            value = loss_of(cell, rate, log2, rng)
            study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
        studies.append(study)
    return studies


def times(strategy: str, cells: list[RunSize], trials: int, asks: int) -> np.ndarray:
    """Seconds of each ask."""
    rng, space = np.random.default_rng(1), search_space(RATES, BATCHES)
    studies, found = studies_of(strategy, cells, trials), []
    for i in range(asks + 1):
        cell, study = cells[i % len(cells)], studies[i % len(cells)]
        begun = time.process_time()
        trial = study.ask(space)
        found.append(time.process_time() - begun)
        where = trial.params["learning_rate"], trial.params["log2_batch_sequences"]
        study.tell(trial, loss_of(cell, *where, rng))
    return np.array(found[1:])  # the first fits from nothing


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a proposal takes.")
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--asks", type=int, default=40)
    parser.add_argument("--json", type=Path)
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
    if args.json:
        args.json.write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
