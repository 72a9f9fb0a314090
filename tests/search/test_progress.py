"""The display of a running study: time left, plain lines, and what a terminal shows."""

import heapq
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from raysweep.results import Results
from raysweep.search.progress import Progress, Timing
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import StudyScheduler
from raysweep.study import Study

STUDY = {
    "study": "shown",
    "scales": [{"d_model": 16, "layers": 2, "heads": 2}, {"d_model": 32, "layers": 2, "heads": 2}],
    "horizons": [{"tokens_per_param": 20}],
    "model": {"sequence_length": 32},
    "search": {"trials_per_cell": 2, "strategy": "qmc"},
}


DEMO = Path(__file__).parents[2] / "reports/examples/laptop/results"

Trial = tuple[str, float, float]
"""Architecture, FLOPs of its cell, seconds."""


@pytest.mark.parametrize("exponent", [0.4, 0.8])
def test_durations_of_unknown_cells_follow_the_law_of_the_known(exponent: float) -> None:
    timing = Timing()
    for flops in (1e9, 1e10, 1e11):
        for _ in range(10):
            timing.add(flops, 3.0 * (flops / 1e9) ** exponent)
    assert timing.one(1e12) / (3.0 * 1e3**exponent) == pytest.approx(1.0, abs=0.35)
    assert timing.one(1e10) / (3.0 * 10**exponent) == pytest.approx(1.0, abs=0.15)


def test_one_slow_trial_moves_little() -> None:
    timing = Timing()
    for _ in range(5):
        timing.add(1e9, 2.0)
    before = timing.one(1e10)
    timing.add(1e9, 60.0)
    assert 1 < timing.one(1e10) / before < 2


def demo() -> list[Trial]:
    rows = Results.open(DEMO).to_pandas().sort_values("started_at")
    flops = rows.groupby("cell")["flops"].transform("mean")
    return list(zip(rows["architecture"], flops, rows["seconds_wall"], strict=True))


def planted(exponent: float) -> list[Trial]:
    rng = np.random.default_rng(0)
    return [
        (
            name,
            1e12 * 4.0**k,
            (2 + pace * 4.0 ** (k * exponent)) * float(np.exp(rng.normal(0, 0.3))),
        )
        for k in range(8)
        for name, pace in (("dense", 1.0), ("moe", 1.5))
        for _ in range(12)
    ]


@pytest.mark.parametrize("trials", [demo(), planted(0.6), planted(1.0)], ids=["demo", "0.6", "1"])
def test_the_end_that_is_told_swings_by_less_than_two(trials: Sequence[Trial]) -> None:
    timing, workers = Timing(), [4.0, 4.0]  # seconds until Ray is there
    done = []
    for name, flops, seconds in trials:
        start = heapq.heappop(workers)
        heapq.heappush(workers, start + seconds)
        done.append((start + seconds, name, flops, seconds))
    done.sort()
    whole, told = done[-1][0], []
    for k, (now, name, flops, seconds) in enumerate(done[:-1]):
        timing.add(flops, seconds, name)
        rest = sum(timing.one(f, a) for _, a, f, _ in done[k + 1 :]) / len(workers)
        end = now + timing.smoothed(rest, now)
        if now > 0.1 * whole:
            told.append(end / whole)
    assert max(told) / min(told) < 2
    assert max(told[len(told) // 2 :]) / min(told[len(told) // 2 :]) < 1.4


@pytest.mark.parametrize("terminal", [True, False])
def test_shows_cells_trials_best_loss_and_time_left(terminal: bool) -> None:
    scheduler = StudyScheduler(Study.from_dict(STUDY), "data", ResourcePool({"n": {"CPU": 1.0}}))
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=30)
    with Progress(scheduler, console) as progress:
        proposal = scheduler.ask("t0")
        assert proposal is not None
        scheduler.tell("t0", "finished", 2.125)
        progress.trial_done(proposal.spec.cell.name, "finished", 1.0)
        progress.refresh(force=True)
    text = out.getvalue()
    assert "1/4 trials" in text
    assert "left" in text
    assert "2.125" in text
    assert ("\x1b" in text) == terminal
    if terminal:
        assert all(cell.name in text for cell in scheduler.study.cells)


def test_time_left_counts_the_workers_of_each_trial() -> None:
    """Of two cells with equal FLOPs, trials on four workers are through in a quarter of the time,
    and one runs at once where four of the other do."""
    scales = [{"d_model": 16, "layers": 1, "heads": 1, "name": n} for n in "ab"]
    scales[1]["resources"] = {"workers": 4}
    study = Study.from_dict(STUDY | {"scales": scales, "horizons": [{"tokens": 100_000}]})
    scheduler = StudyScheduler(study, "data", ResourcePool({"n": {"CPU": 4.0}}))
    timing = Timing()
    one, four = scheduler.states.values()
    timing.add(one.cell.flops, 400.0, one.cell.architecture)
    timing.add(four.cell.flops / 4, 100.0, four.cell.architecture)
    left = timing.left(scheduler)
    wanted = one.wanted * 400 / 4 + four.wanted * 100
    assert left == pytest.approx(wanted, rel=0.3)
