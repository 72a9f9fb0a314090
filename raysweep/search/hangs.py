"""Workers that hang: trials that have been silent far longer than any trial of their cell before.

Only trials on one worker are looked after: those on several have Ray Train, which gives up on a
worker that does not answer for 10 minutes, and on one that the others wait for after 30.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

TIMES_LONGEST = 20.0
"""A silence this many times the longest that a trial of the cell came out of is a hang."""
TIMES_AT_START = 6.0
"""The first report may take longer: data are fetched, and models compiled."""


@dataclass
class _Running:
    cell: str
    heard: float
    patient: bool
    reports: int = 0


class HangDetector:
    """Told when trials start, report and end; says which of them hang.

    Args:
        seconds: the least silence that counts; 0 is never.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._longest: dict[str, float] = {}

    def started(self, trial: str, cell: str, *, patient: bool = False) -> None:
        """A trial has begun, or begun again. One that reports as it likes is waited for longer, as
        all are before their first report."""
        self._running[trial] = _Running(cell, self._clock(), patient)

    def heard(self, trial: str) -> None:
        """A trial has reported."""
        running = self._running.get(trial)
        if running is None:
            return
        now = self._clock()
        if running.reports:
            silence = now - running.heard
            self._longest[running.cell] = max(silence, self._longest.get(running.cell, 0.0))
        running.heard, running.reports = now, running.reports + 1

    def ended(self, trial: str) -> None:
        """A trial is over, or its worker is gone."""
        self._running.pop(trial, None)

    def hanging(self) -> dict[str, float]:
        """Trials whose worker hangs, with the seconds since they were last heard."""
        if not self._seconds:
            return {}
        now = self._clock()
        silences = {trial: now - running.heard for trial, running in self._running.items()}
        return {t: s for t, s in silences.items() if s > self._limit(self._running[t])}

    def _limit(self, running: _Running) -> float:
        limit = max(self._seconds, TIMES_LONGEST * self._longest.get(running.cell, 0.0))
        ready = running.reports and not running.patient
        return limit if ready else TIMES_AT_START * limit
