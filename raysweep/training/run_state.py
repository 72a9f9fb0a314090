"""Where a run stands and what it has measured: all of its state but the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raysweep.study.spec import TrialSpec
from raysweep.training.horizon_metrics import HorizonMetrics
from raysweep.training.outcome import Status
from raysweep.training.step import BatchGradient


class Pace(NamedTuple):
    """Steps that were timed, and their seconds: those that compiled are left out."""

    steps: int = 0
    seconds: float = 0.0


class RunState:
    """A run to the longest horizon, or in a branch of it to a shorter one."""

    def __init__(self, spec: TrialSpec, branches: Sequence[TrialSpec]) -> None:
        self.spec = spec
        self.step = 0
        self.seconds = 0.0
        """Spent on the current horizon, over all attempts."""
        self.pace = Pace()
        """Of these, what says how fast steps are."""
        self.metrics = HorizonMetrics(spec)
        """That of the run, or of the branch that it is in."""
        self.waiting = sorted(map(HorizonMetrics, branches), key=lambda t: t.leaves_at)
        """Branches that have not begun."""
        self.stable_run: dict[str, Any] | None = None
        """In a branch: the state, with the model's, of the run that it left."""
        # Of the steps since the device was last waited for:
        self._pending: list[Tensor] = []
        self._rates: list[float] = []
        self._traces: dict[int, Tensor] = {}

    @property
    def horizons(self) -> list[HorizonMetrics]:
        """The horizons that the next step counts for, the current one first: in the stable phase
        also those of all branches to come."""
        return [self.metrics] if self.stable_run is not None else [self.metrics, *self.waiting]

    @property
    def next_branch(self) -> HorizonMetrics | None:
        """The branch whose decay begins next; None within a branch."""
        return self.waiting[0] if self.waiting and self.stable_run is None else None

    @property
    def begun(self) -> int:
        """The step at which the current branch left the stable run; 0 outside a branch."""
        return self.stable_run["step"] if self.stable_run is not None else 0

    def enter(self, branch: HorizonMetrics, stable_run: dict[str, Any]) -> None:
        """Go on in a branch; `stable_run` is the state to return to after it."""
        self.metrics, self.stable_run, self.seconds, self.pace = branch, stable_run, 0.0, Pace()

    def wants_trace(self) -> bool:
        """Whether tr S is to be estimated at the next step, for any horizon."""
        return self.spec.recipe.noise_scale and any(
            metrics.noise.wants_pair(self.step) for metrics in self.horizons
        )

    def add(self, batch: BatchGradient, rate: float) -> None:
        """Count a step. Its numbers stay on the device, which is not waited for."""
        self._pending.append(batch.numbers)
        self._rates.append(rate)
        if batch.trace is not None:
            self._traces[self.step] = batch.trace
        self.step += 1

    def read(self) -> tuple[Status, str] | None:
        """Wait for the device and tell the horizons of the steps since the last time; what ended
        the run and why, if something did."""
        rows = torch.stack(self._pending).tolist()
        losses, grad_sqs, failed = zip(*rows, strict=True)
        first = self.step - len(rows)
        if any(failed):
            return "out_of_memory", f"no memory for one sequence at step {first + 1}"
        traces = {
            step: value
            for step, trace in self._traces.items()
            if not math.isnan(value := trace.item())
        }
        for metrics in self.horizons:
            metrics.add(first, losses, grad_sqs, traces, self._rates)
        self._pending.clear()
        self._rates.clear()
        self._traces.clear()
        return ("diverged", self.metrics.diverged) if self.metrics.diverged else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "pace": tuple(self.pace),
            "metrics": self.metrics.spec.key,
            "horizons": {t.spec.key: t.state() for t in self.horizons},
            "pending": self._pending,
            "rates": self._rates,
            "traces": self._traces,
            "trunk": self.stable_run,
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned, on the run or in a branch of it."""
        self.step, self.seconds, self.stable_run = (
            state["step"],
            state["seconds"],
            state["trunk"],
        )
        self.pace = Pace(*state["pace"])
        on_run = state if self.stable_run is None else self.stable_run
        horizons = {t.spec.key: t for t in (HorizonMetrics(self.spec), self.metrics, *self.waiting)}
        known = {**on_run["horizons"], **state["horizons"]}
        for key, metrics in horizons.items():
            if key in known:
                metrics.load(known[key])
        self.metrics = horizons[state["metrics"]]
        self.waiting = [
            t for t in self.waiting if t is not self.metrics and t.spec.key in on_run["horizons"]
        ]
        self._pending = [numbers.to(device) for numbers in state["pending"]]
        self._rates = list(state["rates"])
        self._traces = {step: trace.to(device) for step, trace in state["traces"].items()}
