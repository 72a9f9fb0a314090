"""Which trials hang: silence measured against what trials of the cell came out of before."""

from raysweep.search.hangs import TIMES_AT_START, TIMES_LONGEST, HangDetector


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_silence_is_measured_against_the_longest_of_the_cell() -> None:
    clock = Clock()
    stalls = HangDetector(600.0, clock)
    stalls.started("t1", "small")
    stalls.started("t2", "large")
    for _ in range(6):  # a step of the large cell takes two minutes
        clock.now += 60
        stalls.heard("t1")
        clock.now += 60
        stalls.heard("t1")
        stalls.heard("t2")
    clock.now += TIMES_LONGEST * 60 + 1
    assert set(stalls.hanging()) == {"t1"}
    clock.now += TIMES_LONGEST * 60
    assert set(stalls.hanging()) == {"t1", "t2"}
    stalls.ended("t1")
    stalls.heard("t2")
    assert stalls.hanging() == {}


def test_the_first_report_may_take_longer_and_a_new_worker_starts_anew() -> None:
    clock = Clock()
    stalls = HangDetector(10.0, clock)
    stalls.started("t", "cell")
    clock.now = TIMES_AT_START * 10
    assert stalls.hanging() == {}
    clock.now += 1
    assert stalls.hanging() == {"t": clock.now}
    stalls.started("t", "cell")
    assert stalls.hanging() == {}
    stalls.heard("t")
    clock.now += 11
    assert stalls.hanging() == {"t": 11.0}


def test_nought_is_never() -> None:
    clock = Clock()
    stalls = HangDetector(0.0, clock)
    stalls.started("t", "cell")
    clock.now = 1e9
    assert stalls.hanging() == {}


def test_one_that_reports_as_it_likes_is_waited_for_longer() -> None:
    """A user's own training."""
    clock = Clock()
    stalls = HangDetector(100.0, clock)
    for trial, patient in (("ours", False), ("own", True)):
        stalls.started(trial, "cell", patient=patient)
        stalls.heard(trial)
    clock.now += 100.0 * TIMES_AT_START - 1
    assert set(stalls.hanging()) == {"ours"}
    clock.now += 2.0
    assert set(stalls.hanging()) == {"ours", "own"}
