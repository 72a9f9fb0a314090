"""The display of a running study: time left, plain lines, and what a terminal shows."""

import heapq
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from raysweep.results import Results
from raysweep.search.durations import Durations
from raysweep.search.progress import Progress, Timing
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import StudyScheduler
from raysweep.study import Cell, Study

STUDY = {
    "study": "shown",
    "scales": [{"d_model": 16, "layers": 2, "heads": 2}, {"d_model": 32, "layers": 2, "heads": 2}],
    "horizons": [{"tokens_per_param": 20}],
    "model": {"sequence_length": 32},
    "search": {"trials_per_cell": 2, "strategy": "qmc"},
}

DEMO = Path(__file__).parents[2] / "reports/examples/laptop/results"

SecondsOf = Callable[[Cell], float]


def cells_of(*tokens: float) -> tuple[Cell, ...]:
    """Cells of one model: their FLOPs are in proportion to their tokens."""
    space = STUDY | {"scales": STUDY["scales"][:1], "horizons": [{"tokens": n} for n in tokens]}
    return tuple(Study.from_dict(space).cells)


@pytest.mark.parametrize("exponent", [0.4, 0.8])
def test_durations_of_unknown_cells_follow_the_law_of_the_known(exponent: float) -> None:
    durations, (*known, unknown) = Durations(), cells_of(1e5, 1e6, 1e7, 1e8)
    for k, cell in enumerate(known):
        for _ in range(10):
            durations.add(cell, 3.0 * 10 ** (k * exponent))
    assert durations.of(unknown) / (3.0 * 1e3**exponent) == pytest.approx(1.0, abs=0.35)
    assert durations.of(known[1]) / (3.0 * 10**exponent) == pytest.approx(1.0, abs=0.1)


def test_one_slow_trial_moves_little() -> None:
    durations, (small, large) = Durations(), cells_of(1e5, 1e6)
    for _ in range(5):
        durations.add(small, 2.0)
    before = durations.of(large)
    durations.add(small, 60.0)
    assert 1 < durations.of(large) / before < 2


def test_before_any_trial_is_through_durations_are_in_proportion_to_flops() -> None:
    durations, (small, large) = Durations(), cells_of(1e5, 1e6)
    assert not durations.known
    assert durations.of(large) / durations.of(small) == pytest.approx(10)


def laptop() -> tuple[Study, SecondsOf]:
    """The demo, with the seconds that its trials took."""
    rows = Results.open(DEMO).to_pandas().sort_values("started_at")
    took = {cell: itertools.cycle(each) for cell, each in rows.groupby("cell")["seconds_wall"]}
    quick = ["search.strategy=qmc", "search.extend_edges=false"]
    study = Study.load(DEMO / "studies/laptop.yaml", quick)
    return study, lambda cell: next(took[cell.name])


def planted(exponent: float) -> tuple[Study, SecondsOf]:
    """Trials of a fixed cost and a power of the FLOPs, slower for one of two architectures."""
    study = Study.from_dict(
        STUDY
        | {
            "architectures": {"dense": {}, "moe": {"experts": 4}},
            "scales": [{"d_model": d, "layers": 2, "heads": 2} for d in (16, 32, 64, 128)],
            "horizons": [{"tokens_per_param": 10}, {"tokens_per_param": 20}],
            "search": {"trials_per_cell": 12, "strategy": "qmc", "extend_edges": False},
        }
    )
    rng, least = np.random.default_rng(0), min(cell.flops for cell in study.cells)

    def seconds(cell: Cell) -> float:
        pace = 1.5 if cell.architecture == "moe" else 1.0
        mean = 2 + pace * (cell.flops / least) ** exponent
        return mean * float(np.exp(rng.normal(0, 0.3)))

    return study, seconds


def ends_said(study: Study, seconds: SecondsOf) -> tuple[list[tuple[float, float]], float]:
    """On four workers: when each trial was through, and when the study would end as was said then;
    and when it did."""
    now, events = 0.0, []
    pool = ResourcePool({"n": {"CPU": 4.0}})
    scheduler = StudyScheduler(study, "data", pool, clock=lambda: now)
    timing, ids, said = Timing(scheduler), itertools.count(), []
    now = 4.0  # until Ray is there
    assert timing.left() is None
    while not scheduler.done:
        while (proposal := scheduler.ask(f"t{next(ids)}")) is not None:
            heapq.heappush(events, (now + seconds(proposal.spec.cell), proposal.id))
        assert said or timing.left() is None
        now, trial = heapq.heappop(events)
        scheduler.tell(trial, "finished", 3.0)
        left = timing.left()
        assert left is not None
        said.append((now, now + left))
    return said, now


@pytest.mark.parametrize("case", [laptop(), planted(0.6), planted(1.0)], ids=["laptop", "0.6", "1"])
def test_the_end_that_is_said_is_near_the_truth_and_does_not_jump(
    case: tuple[Study, SecondsOf],
) -> None:
    said, whole = ends_said(*case)
    ends = [end / whole for now, end in said if now > 0.1 * whole]
    assert max(ends) / min(ends) < 2
    assert all(0.5 < end < 2 for end in ends)
    later = [end / whole for now, end in said if now > 0.5 * whole]
    assert all(0.8 < end < 1.25 for end in later)


@pytest.mark.parametrize("terminal", [True, False])
def test_shows_cells_trials_best_loss_and_time_left(terminal: bool) -> None:
    scheduler = StudyScheduler(Study.from_dict(STUDY), "data", ResourcePool({"n": {"CPU": 1.0}}))
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=30)
    with Progress(scheduler, console) as progress:
        assert scheduler.ask("t0") is not None
        scheduler.tell("t0", "finished", 2.125)
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
    one, four = scheduler.states.values()
    scheduler.durations.add(one.cell, 400.0)
    scheduler.durations.add(four.cell, 100.0)
    wanted = one.wanted * 400 / 4 + four.wanted * 100
    assert scheduler.seconds_left == pytest.approx(wanted, rel=0.3)
    assert Timing(scheduler).left() == pytest.approx(scheduler.seconds_left)


def test_the_start_of_a_worker_is_not_time_of_its_trial() -> None:
    now = 0.0
    pool = ResourcePool({"n": {"CPU": 1.0}})
    scheduler = StudyScheduler(Study.from_dict(STUDY), "data", pool, clock=lambda: now)
    first = scheduler.ask("t0")
    assert first is not None
    now = 60.0
    scheduler.started("t0")
    now = 62.0
    scheduler.tell("t0", "finished", 3.0)
    assert scheduler.durations.of(first.spec.cell) == pytest.approx(2.0, rel=0.1)
