"""What is measured of a run, as a run of one horizon.

A WSD run may serve several horizons: until the decay of a shorter one would begin, its steps are
those of the longer. Each horizon then has metrics of its own, and all are told of the steps that
they share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raysweep.study.spec import TrialSpec
from raysweep.training import schedule
from raysweep.training.monitor import Monitor
from raysweep.training.noise_scale import NoiseScale


class HorizonMetrics:
    """One horizon's learning rates, curve, smoothed losses and noise scale."""

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec
        self.steps = spec.steps
        self.monitor = Monitor(spec.steps, spec.batch_tokens)
        self.noise = NoiseScale(spec.steps, spec.batch_sequences)
        self.diverged: str | None = None
        """Why, if it has: the longer run, smoothed over more steps, may not have yet."""

    def rate(self, step: int) -> float:
        """The learning rate of a step: that of the middle of its batch."""
        tokens = (step + 0.5) * self.spec.batch_tokens
        spec = self.spec
        return schedule.learning_rate(spec.recipe, spec.learning_rate, tokens, spec.horizon)

    @property
    def leaves_at(self) -> int:
        """Steps that any longer run of the same WSD recipe shares with this one."""
        start = self.spec.recipe.decay_start(self.spec.horizon)
        return max(0, min(self.steps, math.floor(start / self.spec.batch_tokens + 0.5)))

    def add(
        self,
        first: int,
        losses: Sequence[float],
        grad_sqs: Sequence[float],
        traces: Mapping[int, float],
        rates: Sequence[float],
    ) -> None:
        """Take in the steps from number `first` on, unless it has diverged before.

        `traces` are estimates of tr S by step.
        """
        if self.diverged:
            return
        for step, (loss, sq) in enumerate(zip(losses, grad_sqs, strict=True), start=first):
            self.noise.add_step(step, loss, sq)
            if step in traces and self.noise.wants_pair(step):
                self.noise.add_trace(step, traces[step])
        self.diverged = self.monitor.add(losses, [math.sqrt(sq) for sq in grad_sqs], rates)

    def state(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor.state(),
            "noise": self.noise.state(),
            "diverged": self.diverged,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.monitor.load(state["monitor"])
        self.noise = NoiseScale(**state["noise"])
        self.diverged = state["diverged"]
