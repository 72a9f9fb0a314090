"""A short calibration: how long this machine takes for a step of a study's smallest and largest
cells, with as many at once as the study would run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.errors import UserError
from raysweep.study import Cell, Study
from raysweep.study.plan import Calibration, Pace
from raysweep.training.outcome import Silent

SECONDS = 0.4
"""What one measurement may take, once it is known how long a step is."""
STEPS = 4
"""Steps of a first look, and the least that are timed."""
LONGEST = 1.5
"""A cell whose smallest step would take longer than so many seconds is not tried; a smaller one
stands in."""
MAX_AT_ONCE = 8
"""Processes that measure side by side; more workers than this are supposed to be as fast."""

_MARK = "calibration: "


@dataclasses.dataclass(frozen=True)
class _Noise:
    """A corpus of random tokens: a step costs the same on any text."""

    train: np.ndarray
    validation: np.ndarray
    hash: str = "calibration"
    bytes_per_token: float | None = None


def calibrate(study: Study) -> Calibration:
    """Time real training steps in processes of their own, as many at once as workers would run.

    Raises UserError where the study wants GPUs that are not here, or nothing could be timed.
    """
    asked = json.dumps({"space": study.space.model_dump(mode="json"), "folder": str(study.folder)})
    processors = float(_processors())
    resources = study.cells[0].resources
    gpus = _gpus() if resources.gpus_per_worker else 0
    slots = int(processors // resources.cpus_per_worker) or 1
    if resources.gpus_per_worker:
        if not gpus:
            raise UserError("the study wants GPUs and none is here: no time can be estimated")
        slots = min(slots, int(gpus / resources.gpus_per_worker))
    slots = max(1, min(slots, sum(study.space.search.trials_per_cell for _ in study.cells)))
    children = []
    for k in range(min(slots, MAX_AT_ONCE)):
        environment = {**os.environ}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _gpu(k % gpus)
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "raysweep.training.calibrate"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write(asked)
            child.stdin.close()
            child.stdin = None
        answers = [child.communicate() for child in children]
    finally:
        for child in children:
            child.kill()
    found = [_answer(out) for out, _ in answers]
    good = [paces for paces in found if paces]
    if not good:
        said = answers[0][1].strip().splitlines()
        raise UserError(f"the calibration failed: {said[-1] if said else 'no reason given'}")
    return Calibration(slots=slots, paces=_mean(good), at_once=len(good))


def _processors() -> int:
    """The CPUs that this process may use; all where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu(index: int) -> str:
    """The name of one of the GPUs that this process sees, of which the user may have made a
    choice."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[index].strip() if chosen else str(index)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _answer(text: str) -> list[Pace]:
    lines = [line for line in text.splitlines() if line.startswith(_MARK)]
    return [Pace(**row) for row in json.loads(lines[-1].removeprefix(_MARK))] if lines else []


def _mean(found: list[list[Pace]]) -> tuple[Pace, ...]:
    """Each cell's mean over the processes that timed it."""
    by_cell: dict[str, list[Pace]] = {}
    for paces in found:
        for pace in paces:
            by_cell.setdefault(pace.cell, []).append(pace)
    numbers = ("seconds_per_step", "seconds_per_token", "seconds_fixed")
    return tuple(
        dataclasses.replace(
            own[0], **{n: float(np.mean([getattr(p, n) for p in own])) for n in numbers}
        )
        for own in by_cell.values()
    )


def measure(study: Study) -> list[Pace]:
    """Time the smallest and the largest cell that is not too slow, of each architecture."""
    paces = []
    for architecture in dict.fromkeys(c.architecture for c in study.cells):
        by_cost = {
            c.counts.flops_per_token: c for c in study.cells if c.architecture == architecture
        }
        cells = [by_cost[cost] for cost in sorted(by_cost)]
        first = _pace(study, cells[0])
        paces.append(first)
        batch = _batches(study, cells[0])[0] * cells[0].shape.sequence_length
        step = first.seconds_per_step + first.seconds_per_token * batch
        for cell in reversed(cells[1:]):
            if step * cell.counts.flops_per_token / cells[0].counts.flops_per_token < LONGEST:
                paces.append(_pace(study, cell))
                break
    return paces


def _batches(study: Study, cell: Cell) -> tuple[int, int]:
    """The ends of the range of batches, in sequences."""
    wanted = study.space.search.batch_sequences
    return int(wanted.low), int(wanted.high)


def _pace(study: Study, cell: Cell) -> Pace:
    """seconds of a step = per step + per token * tokens of its batch, from a small and a large
    batch."""
    low, high = _batches(study, cell)
    length = cell.shape.sequence_length
    small, fixed = _step(study, cell, low)
    large = min(high, low * 8)
    while large > low and small * large / low > LONGEST:
        large //= 2
    if large == low:
        return Pace(cell.name, cell.architecture, cell.counts.flops_per_token,
                    0.0, small / (low * length), fixed)  # fmt: skip
    more, _ = _step(study, cell, large)
    per_token = max((more - small) / ((large - low) * length), 0.0)
    per_token = min(per_token, small / (low * length))
    return Pace(cell.name, cell.architecture, cell.counts.flops_per_token,
                max(small - per_token * low * length, 0.0), per_token, fixed)  # fmt: skip


class _Clock(Silent):
    """Hears a run's steps, and when."""

    def __init__(self) -> None:
        self.at: list[tuple[int, float]] = []

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.at.append((step, time.perf_counter()))

    def seconds(self) -> float:
        """Of a step, the first left out: it compiles, and warms up."""
        (first, begun), (last, ended) = self.at[0], self.at[-1]
        return (ended - begun) / (last - first)


def _step(study: Study, cell: Cell, batch_sequences: int) -> tuple[float, float]:
    """(seconds of a step, seconds beside the steps of a run) by short runs of the real loop, its
    blocks compiled if those of the cell's own trials would be."""
    from raysweep.training import runtime
    from raysweep.training.loop import train

    length = cell.shape.sequence_length
    corpus = noise(cell.shape.vocab_size, 64 * (length + 1))
    device = runtime.choose_device(cell.resources)
    compiled = runtime.compiles(device, study.space.recipe, cell.flops)
    recipe = study.space.recipe.model_copy(update={"compile": "on" if compiled else "off"})
    steps, seconds, fixed = STEPS, 0.0, 0.0
    for _ in range(2):
        tokens = steps * batch_sequences * length
        spec = dataclasses.replace(
            study.trial(dataclasses.replace(cell, tokens=tokens), "calibration",
                        1e-4, batch_sequences, 0),
            validation_sequences=1,
            validation_sets=(),
            recipe=recipe,
        )  # fmt: skip
        clock, begun = _Clock(), time.perf_counter()
        outcome = train(spec, corpus, reporter=clock, threads=cell.resources.threads)
        wall = time.perf_counter() - begun
        if len(clock.at) < 2:
            raise UserError(f"cell {cell.name} cannot be trained here: {outcome.reason}")
        seconds = clock.seconds()
        fixed = max(0.0, wall - steps * seconds)
        if steps * seconds > SECONDS:
            break
        steps = max(STEPS, int(SECONDS / seconds))
    return seconds, fixed


def noise(vocabulary: int, count: int) -> Any:
    """A small corpus of random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, 4 * count, dtype=np.uint32).astype(np.int64)
    return _Noise(tokens[count:], tokens[:count])


def _main() -> None:
    asked = json.load(sys.stdin)
    study = Study.from_dict(asked["space"], Path(asked["folder"]))
    found = [dataclasses.asdict(p) for p in measure(study)]
    print(_MARK + json.dumps(found))


if __name__ == "__main__":
    _main()
