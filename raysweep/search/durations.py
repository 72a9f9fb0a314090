"""How long trials take: learned from those that finished, to order and to place the others."""

from __future__ import annotations

import math

from raysweep.study import Cell

SLOPE = 0.7, 0.3, 1.1
"""Of seconds in the work of a worker, in logs: where nothing is known, least and most. Tiny models
take time a step, and large ones a FLOP."""
FLOPS_A_SECOND = 1e12
"""Of a worker, before any trial is through: only ratios count then."""


class Durations:
    """Seconds that trials of cells took, and what is expected of others."""

    def __init__(self) -> None:
        self._seconds: dict[str, tuple[float, float, int]] = {}
        """By cell: work of a worker, mean seconds, trials."""
        self._expected: dict[str, float] = {}

    @property
    def known(self) -> bool:
        """Whether any trial has finished."""
        return bool(self._seconds)

    def add(self, cell: Cell, seconds: float) -> None:
        """Note a trial that finished."""
        work, mean, count = self._seconds.get(cell.name, (_work(cell), 0.0, 0))
        mean += (max(seconds, 1e-3) - mean) / (count + 1)
        self._seconds[cell.name] = work, mean, count + 1
        self._expected.clear()

    def of(self, cell: Cell) -> float:
        """Seconds expected of a trial: its cell's mean, or a power law in the FLOPs of a worker
        through the nearest cell known."""
        if cell.name in self._seconds:
            return self._seconds[cell.name][1]
        if cell.name not in self._expected:
            self._expected[cell.name] = self._extrapolated(_work(cell))
        return self._expected[cell.name]

    def _extrapolated(self, work: float) -> float:
        known = {math.log(work): math.log(mean) for work, mean, _ in self._seconds.values()}
        if not known:
            return work / FLOPS_A_SECOND
        x = math.log(work)
        slope, least, most = SLOPE
        centre, level = (sum(v) / len(known) for v in (known.keys(), known.values()))
        spread = sum((k - centre) ** 2 for k in known)
        if spread > 0:
            slope = sum((k - centre) * (v - level) for k, v in known.items()) / spread
        near = min(known, key=lambda k: abs(k - x))
        return math.exp(known[near] + min(most, max(least, slope)) * (x - near))


def _work(cell: Cell) -> float:
    return max(1.0, cell.flops / cell.resources.workers)
