"""Where a run stands and what it has measured: all of its state but the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raysweep.study.study import TrialSpec
from raysweep.training.outcome import Status
from raysweep.training.step import BatchGradient
from raysweep.training.track import Track


class Pace(NamedTuple):
    """Steps that were timed, and their seconds: those that compiled are left out."""

    steps: int = 0
    seconds: float = 0.0


class Course:
    """A run to the longest horizon, or in a branch of it to a shorter one."""

    def __init__(self, spec: TrialSpec, branches: Sequence[TrialSpec]) -> None:
        self.spec = spec
        self.step = 0
        self.seconds = 0.0
        """Spent on the current track, over all attempts."""
        self.pace = Pace()
        """Of these, what says how fast steps are."""
        self.track = Track(spec)
        """That of the run, or of the branch that it is in."""
        self.waiting = sorted(map(Track, branches), key=lambda t: t.leaves_at)
        """Branches that have not begun."""
        self.trunk: dict[str, Any] | None = None
        """In a branch: the state, with the model's, of the run that it left."""
        # Of the steps since the device was last waited for:
        self._pending: list[Tensor] = []
        self._rates: list[float] = []
        self._traces: dict[int, Tensor] = {}

    @property
    def tracks(self) -> list[Track]:
        """Those that the next step belongs to, the current one first."""
        return [self.track] if self.trunk is not None else [self.track, *self.waiting]

    @property
    def next_branch(self) -> Track | None:
        """The branch that leaves next; a branch has none."""
        return self.waiting[0] if self.waiting and self.trunk is None else None

    @property
    def begun(self) -> int:
        """The first step of the current track's own: those before a branch are lent by the run."""
        return self.trunk["step"] if self.trunk is not None else 0

    def enter(self, branch: Track, trunk: dict[str, Any]) -> None:
        """Go on in a branch; `trunk` is what the run later goes on from."""
        self.track, self.trunk, self.seconds, self.pace = branch, trunk, 0.0, Pace()

    def wants_trace(self) -> bool:
        """Whether tr S is to be estimated at the next step, for any track."""
        return self.spec.recipe.noise_scale and any(
            track.noise.wants_pair(self.step) for track in self.tracks
        )

    def add(self, batch: BatchGradient, rate: float) -> None:
        """Count a step. Its numbers stay on the device, which is not waited for."""
        self._pending.append(batch.numbers)
        self._rates.append(rate)
        if batch.trace is not None:
            self._traces[self.step] = batch.trace
        self.step += 1

    def read(self) -> tuple[Status, str] | None:
        """Wait for the device and tell the tracks of the steps since the last time; what ended
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
        for track in self.tracks:
            track.add(first, losses, grad_sqs, traces, self._rates)
        self._pending.clear()
        self._rates.clear()
        self._traces.clear()
        return ("diverged", self.track.diverged) if self.track.diverged else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "pace": tuple(self.pace),
            "track": self.track.spec.key,
            "tracks": {t.spec.key: t.state() for t in self.tracks},
            "pending": self._pending,
            "rates": self._rates,
            "traces": self._traces,
            "trunk": self.trunk,
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up what `state` gave, on the run or in a branch of it."""
        self.step, self.seconds, self.trunk = state["step"], state["seconds"], state["trunk"]
        self.pace = Pace(*state["pace"])
        on_run = state if self.trunk is None else self.trunk
        tracks = {t.spec.key: t for t in (Track(self.spec), self.track, *self.waiting)}
        known = {**on_run["tracks"], **state["tracks"]}
        for key, track in tracks.items():
            if key in known:
                track.load(known[key])
        self.track = tracks[state["track"]]
        self.waiting = [
            t for t in self.waiting if t is not self.track and t.spec.key in on_run["tracks"]
        ]
        self._pending = [numbers.to(device) for numbers in state["pending"]]
        self._rates = list(state["rates"])
        self._traces = {step: trace.to(device) for step, trace in state["traces"].items()}
