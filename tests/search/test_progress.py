"""The display of a running study: time left, plain lines, and what a terminal shows."""

import io

import pytest
from rich.console import Console

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


@pytest.mark.parametrize("exponent", [0.4, 1.0])
def test_durations_of_unknown_cells_follow_the_law_of_the_known(exponent: float) -> None:
    timing = Timing()
    for flops in (1e9, 1e10, 1e11):
        timing.add(flops, 3.0 * (flops / 1e9) ** exponent)
    assert timing.one(1e12) == pytest.approx(3.0 * 1e3**exponent)
    assert timing.one(1e10) == pytest.approx(3.0 * 10**exponent)


def test_one_known_cell_is_enough_to_guess() -> None:
    timing = Timing()
    timing.add(1e9, 2.0)
    timing.add(1e9, 4.0)
    assert timing.one(1e9) == 3.0
    assert 3.0 < timing.one(1e10) < 30.0


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
