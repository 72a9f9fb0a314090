"""Training losses as they come: smoothing, the curve, and when a run counts as diverged."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from raysweep.training.outcome import CURVE_COLUMNS, Curve

POINTS = 500
DIVERGED_ABOVE = 1.5
"""A smoothed loss above this multiple of the first step's loss ends the run."""


class Monitor:
    """Fed with the loss, gradient norm and learning rate of each step; a point of the curve every
    `every` steps."""

    def __init__(self, steps: int, batch_tokens: int) -> None:
        self.steps = steps
        self.every = -(-steps // POINTS)
        self.batch_tokens = batch_tokens
        self.curve: Curve = {name: [] for name in CURVE_COLUMNS}
        self.step = 0
        self.start: float | None = None
        self.smooth = 0.0
        # A mean over 0.5 % of the run, so that a rise is seen within 1 % of it.
        self.decay = math.exp(-1 / max(1.0, steps / 200))
        self.recent: list[tuple[float, float]] = []
        self.tail: deque[float] = deque(maxlen=max(1, round(steps / 20)))

    def add(
        self, losses: Sequence[float], norms: Sequence[float], rates: Sequence[float]
    ) -> str | None:
        """Take in some steps; a reason if the run has diverged."""
        for loss, norm, rate in zip(losses, norms, rates, strict=True):
            self.step += 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "loss" if not math.isfinite(loss) else "gradient"
                return f"non-finite {what} at step {self.step}"
            if self.start is None:
                self.start = self.smooth = loss
            self.smooth += (1 - self.decay) * (loss - self.smooth)
            self.tail.append(loss)
            if self.smooth > DIVERGED_ABOVE * self.start:
                return (
                    f"smoothed loss {self.smooth:.3g} at step {self.step} "
                    f"is far above the first, {self.start:.3g}"
                )
            self.recent.append((loss, norm))
            if self.step % self.every == 0 or self.step == self.steps:
                self._point(rate)
        return None

    def _point(self, rate: float) -> None:
        losses, norms = zip(*self.recent, strict=True)
        point = (
            self.step,
            self.step * self.batch_tokens,
            math.fsum(losses) / len(losses),
            rate,
            math.fsum(norms) / len(norms),
        )
        for name, value in zip(CURVE_COLUMNS, point, strict=True):
            self.curve[name].append(value)
        self.recent.clear()

    @property
    def final_loss(self) -> float | None:
        """Mean over the last twentieth of the steps, or of those there were."""
        return math.fsum(self.tail) / len(self.tail) if self.tail else None

    def state(self) -> dict[str, Any]:
        return {**vars(self), "tail": list(self.tail)}

    def load(self, state: dict[str, Any]) -> None:
        longest = self.tail.maxlen
        self.__dict__.update(state)
        self.tail = deque(state["tail"], maxlen=longest)
