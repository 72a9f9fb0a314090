"""How long trials take: learned from those that finished, to order and to place the others, and to
say when the study will end."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from raysweep.study import Cell

SLOPE, SLOPE_SD = 0.7, 0.3
"""Exponent of a trial's seconds in the FLOPs of a worker, before any is known: tiny models take
time a step, large ones a FLOP."""
BEND_SD, BEND_OVER = 0.5, 3.0
"""How far the seconds bend away from that power law, in logs, and over how many logs of FLOPs: a
trial's fixed cost counts less and less."""
PACE_SD, CELL_SD, TRIAL_SD = 0.5, 0.2, 0.4
"""How far architectures, their cells, and at most trials of one cell stray from it, in logs."""
TRIALS_AT_FIRST = 4
"""What `TRIAL_SD` counts for, in trials, against the spread that is found."""
FLOPS_A_SECOND = 1e12
"""Of a worker, before any trial is through: only ratios count then."""

_Place = tuple[str, str, float]
"""Cell, architecture, log of the FLOPs of a worker."""


class Durations:
    """Seconds that trials of cells took, and what is expected of others.

    Seconds follow a power law of FLOPs that bends slowly, each architecture at its own pace, each
    cell a little off; what is known of each is weighed as a Gaussian process does, so that one slow
    trial, or the first of another size, moves what is expected of the others little.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        """Of all cells heard of."""
        self._trials: dict[str, tuple[int, float]] = {}
        """By cell: trials, mean log of their seconds."""
        self._squares = 0.0
        """Of the logs about the means of their cells, summed."""
        self._expected: dict[str, float] = {}

    @property
    def known(self) -> bool:
        """Whether any trial has finished."""
        return bool(self._trials)

    def add(self, cell: Cell, seconds: float) -> None:
        """Note a trial that finished."""
        self._hear_of(cell)
        count, mean = self._trials.get(cell.name, (0, 0.0))
        off = math.log(max(seconds, 1e-3)) - mean
        self._trials[cell.name] = count + 1, mean + off / (count + 1)
        self._squares += off**2 * count / (count + 1)
        self._expected = {}

    def of(self, cell: Cell) -> float:
        """Seconds expected of a trial."""
        self._hear_of(cell)
        if not self._trials:
            return math.exp(self._places[cell.name][2]) / FLOPS_A_SECOND
        if cell.name not in self._expected:
            self._expected = self._fitted()
        return self._expected[cell.name]

    def _hear_of(self, cell: Cell) -> None:
        if cell.name not in self._places:
            work = math.log(max(1.0, cell.flops / cell.resources.workers))
            self._places[cell.name] = cell.name, cell.architecture, work

    def _fitted(self) -> dict[str, float]:
        """Seconds of every cell heard of."""
        known = [self._places[name] for name in self._trials]
        counts, means = np.array(list(self._trials.values())).T
        freedom = TRIALS_AT_FIRST + counts.sum() - len(counts)
        noise = min(TRIAL_SD**2, (TRIALS_AT_FIRST * TRIAL_SD**2 + self._squares) / freedom)
        x = np.array([work for *_, work in known])
        rest = means - SLOPE * x
        level, centre = rest.mean(), float(x.mean())
        covariance = _shared(known, known, centre) + np.diag(noise / counts)
        weights = np.linalg.solve(covariance, rest - level)
        off = _shared(self._places.values(), known, centre) @ weights
        works = np.array([work for *_, work in self._places.values()])
        seconds = np.exp(level + SLOPE * works + off + noise / 2)
        return dict(zip(self._places, seconds.tolist(), strict=True))


def _shared(cells: Iterable[_Place], known: Iterable[_Place], centre: float) -> np.ndarray:
    """Covariance [cells, known] of the logs of their seconds."""
    names, architectures, x = (np.array(column)[:, None] for column in zip(*cells, strict=True))
    others, their_architectures, y = (np.array(column) for column in zip(*known, strict=True))
    return (
        4.0
        + SLOPE_SD**2 * (x - centre) * (y - centre)
        + BEND_SD**2 * np.exp(-0.5 * ((x - y) / BEND_OVER) ** 2)
        + PACE_SD**2 * (architectures == their_architectures)
        + CELL_SD**2 * (names == others)
    )
