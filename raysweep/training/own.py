"""A trial by a user's own Python function: what the function gets, and what becomes of its answer.

The function is called as `train(run)` with a `TrialRun`. It returns the final validation loss in
nats a token, or a mapping with `loss` and further columns. Whatever else it does (raise, return
None, run out of memory, run on for ever) is told in one line, and the study goes on.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raysweep.errors import StorageError, UserError
from raysweep.results.filesystem import Storage
from raysweep.results.schema import is_loss
from raysweep.study.spec import TrialSpec
from raysweep.training import machine
from raysweep.training.monitor import DIVERGED_ABOVE, POINTS
from raysweep.training.outcome import (
    CURVE_COLUMNS,
    Curve,
    Reporter,
    Status,
    TrialOutcome,
    WorkerOutOfMemory,
)
from raysweep.training.trial_folder import TrialFolder
from raysweep.training.user_code import load_function, where

COLUMNS = (
    "loss_se",
    "loss_ema",
    "loss_ema_se",
    "bits_per_byte",
    "train_loss",
    "noise_scale_tokens",
    "noise_grad_sq",
    "noise_trace",
    "expert_load_entropy",
    "expert_load_max_over_mean",
    "router_confidence",
)
"""Keys of a function's answer that are columns of the results; others are kept as `metrics`."""
LOGS = "logs"
"""Folder of the results that holds what trials printed or raised: `KEY.log`."""
WHOLE = 0.98
"""An answer that says it saw less than this share of the horizon's tokens is of a run that was
stopped."""
LOST_PEER = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo", "Gloo")
"""What errors of a worker say that lost another one: not the function's fault."""


class TrialEnded(BaseException):
    """Ends a function from within `TrialRun.report`; no Exception, so that it passes handlers."""


class GroupEnded(Exception):
    """A trial on several workers was ended on one of them: the others must be ended too."""

    def __init__(self, outcome: TrialOutcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One training run, as your training function gets it: `train(run)`.

    Return the final validation loss in nats a token, or a mapping with `loss` and further numbers.
    A loss that is not finite counts as diverged; an exception is recorded with its message.
    """

    learning_rate: float
    """The peak."""
    batch_tokens: int
    """Of the global batch: `batch_sequences * sequence_length`, all workers together."""
    batch_sequences: int
    sequence_length: int
    tokens: int
    """The horizon: what to train on in all. A schedule should end there."""
    steps: int
    """Optimizer steps: `tokens / batch_tokens`, rounded."""
    seed: int
    settings: Mapping[str, Any]
    """Those of the study file: of `training`, the architecture and the scale together, and the
    values of what `search.also` searches."""
    folder: Path
    """This trial's own. What is written here is there again when the trial is started anew, after
    a crash or an interruption; with results in an object store, what `save()` sent last."""
    cell: str
    scale: str
    architecture: str
    rank: int = 0
    """Of this worker, from 0. With several, the process group of torch.distributed is up."""
    world_size: int = 1
    local_rank: int = 0
    """Of this worker on its node; of one worker the GPU is the first that is visible."""
    _progress: Progress = field(repr=False, compare=False)

    def report(
        self,
        tokens: float,
        loss: float,
        *,
        learning_rate: float | None = None,
        grad_norm: float | None = None,
    ) -> None:
        """Tell progress: `tokens` are done, `loss` is the training loss now, in nats a token.

        It becomes the trial's curve; early stopping and the detection of divergence go by it. Call
        it as often as you like, from the first worker or from all: only the first one's counts. A
        run that has diverged, or is stopped early, ends here: this call does not return then.
        """
        self._progress.report(float(tokens), float(loss), learning_rate, grad_norm)

    def should_stop(self) -> bool:
        """Whether to leave a checkpoint in `folder` and return; the trial goes on another time.

        With several workers call it on all of them at the same place: all get one answer.
        """
        return self._progress.should_stop()

    def save(self) -> None:
        """Send `folder` to the study's storage, where that is an object store. Call it once a
        checkpoint is complete. The first worker sends what it holds; others may call it too."""
        self._progress.save()


class Progress:
    """What a run has reported; ends it where that is due: its loss is smoothed as `Monitor` does,
    and of more points than a curve holds every second one is dropped."""

    def __init__(
        self,
        spec: TrialSpec,
        reporter: Reporter,
        folder: TrialFolder,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._spec, self._reporter, self._folder = spec, reporter, folder
        self._rank, self._world_size = rank, world_size
        self._stride, self._reports = 1, 0
        self._first: float | None = None
        self._smooth = 0.0
        self.tokens = 0.0
        self.loss: float | None = None
        self.points: list[tuple[float, ...]] = []
        self.diverged: str | None = None
        self.stopped = False
        """Whether the function was told to stop."""
        self.ended_by: BaseException | None = None
        """What the reporter raised, to end the trial."""

    def report(
        self, tokens: float, loss: float, learning_rate: float | None, grad_norm: float | None
    ) -> None:
        if self._rank:
            return
        if not math.isfinite(loss):
            self._diverge(f"non-finite loss after {tokens:.4g} tokens")
        if self._first is None:
            self._first = self._smooth = loss
        share = max(0.0, tokens - self.tokens) / self._spec.horizon
        self._smooth += (1 - math.exp(-200 * share)) * (loss - self._smooth)
        self.tokens, self.loss = tokens, loss
        step = round(tokens / self._spec.batch_tokens)
        if self._reports % self._stride == 0:
            more = [math.nan if x is None else float(x) for x in (learning_rate, grad_norm)]
            self.points.append((step, tokens, loss, *more))
            if len(self.points) > POINTS:
                self.points, self._stride = self.points[::2], 2 * self._stride
        self._reports += 1
        if self._smooth > DIVERGED_ABOVE * self._first:
            self._diverge(
                f"smoothed loss {self._smooth:.3g} after {tokens:.4g} tokens is far above the "
                f"first, {self._first:.3g}"
            )
        try:
            self._reporter.report(step, int(tokens), self._smooth)
        except BaseException as error:
            self.ended_by = error
            raise

    def should_stop(self) -> bool:
        stop = self._rank == 0 and self._reporter.should_stop()
        if self._world_size > 1:
            stop = _agree(stop)
        self.stopped = self.stopped or stop
        return stop

    def save(self) -> None:
        if self._rank == 0:
            self._folder.save()

    def curve(self) -> Curve:
        columns = zip(*self.points, strict=True) if self.points else [()] * len(CURVE_COLUMNS)
        return {name: list(c) for name, c in zip(CURVE_COLUMNS, columns, strict=True)}

    def _diverge(self, reason: str) -> None:
        self.diverged = reason
        raise TrialEnded(reason)


def _agree(stop: bool) -> bool:
    """What the first worker wants, told to all."""
    import torch
    from torch import distributed

    on_gpu = distributed.get_backend() == "nccl"
    told = torch.tensor([float(stop)], device="cuda" if on_gpu else "cpu")
    distributed.broadcast(told, 0)
    return bool(told.item())


def train_by_function(
    spec: TrialSpec,
    folder: str | Path,
    storage: Storage,
    reporter: Reporter,
    *,
    on_timeout: Callable[[str], object],
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
) -> TrialOutcome:
    """Train by the user's function, found from `folder` (that of the search-space file).

    `on_timeout` is called with the reason, from another thread, once the study's timeout is over;
    it must end the process, since a function that hangs cannot be ended within it.

    Raises:
        UserError: the function raised, returned nothing of use, or cannot be imported.
        WorkerOutOfMemory: it ran out of memory.
        GroupEnded: one of several workers ended the trial.
    """
    training = spec.training
    assert training is not None
    assert training.function is not None
    function = load_function(training.function, folder, "training.function")
    own = TrialFolder(storage, spec.key, training.keep_folders)
    progress = Progress(spec, reporter, own, rank, world_size)
    run = TrialRun(
        learning_rate=spec.learning_rate,
        batch_tokens=spec.batch_tokens,
        batch_sequences=spec.batch_sequences,
        sequence_length=spec.cell.sequence_length,
        tokens=spec.cell.tokens,
        steps=spec.steps,
        seed=spec.seed,
        settings={**(spec.cell.own.settings if spec.cell.own else {}), **dict(spec.also)},
        folder=_open(own, world_size, local_rank),
        cell=spec.cell.name,
        scale=spec.cell.scale,
        architecture=spec.cell.architecture,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        _progress=progress,
    )
    started = time.perf_counter()
    answer: Any = None
    with _alarm(training.timeout, on_timeout), _clean_slate(spec):
        try:
            answer = function(run)
        except TrialEnded:
            pass
        except BaseException as error:
            if error is progress.ended_by or isinstance(error, KeyboardInterrupt):
                raise
            _fail(training.function, error, storage, spec.key, world_size)
        cost = Cost(time.perf_counter() - started, _peak_memory(), _device(spec), world_size)
    # One that was told to stop and did not come to its end has left a checkpoint, whatever it
    # returned.
    if progress.stopped and progress.tokens < min(spec.cell.tokens, spec.horizon):
        progress.save()
        return ended_early(spec, progress, "stopped", None, cost)
    if progress.diverged:
        outcome = ended_early(spec, progress, "diverged", progress.diverged, cost)
        if world_size > 1:
            raise GroupEnded(outcome)
        return outcome
    if rank:  # the first worker's answer counts
        answer = math.nan
    values = read_answer(answer, f"training.function {training.function} returned")
    if training.keep_folders:
        progress.save()
    return judge(spec, values, progress, cost)


def _open(own: TrialFolder, world_size: int, local_rank: int) -> Path:
    """A trial's folder; workers of one machine share it, and the first of them fetches it."""
    if world_size == 1 or own.storage.is_local:
        return own.open()
    from torch import distributed

    if local_rank == 0:
        own.open()
    distributed.barrier()
    return own.path


def read_answer(answer: Any, says: str) -> dict[str, Any]:
    """A loss, or a mapping that holds one, as plain values with `loss` among them.

    Raises UserError that begins with `says`."""
    values = dict(answer) if isinstance(answer, Mapping) else {"loss": answer}
    if values.get("loss") is None:
        what = "no 'loss'" if isinstance(answer, Mapping) else "None"
        raise UserError(f"{says} {what}: return the final loss, or a mapping with 'loss'")
    found: dict[str, Any] = {}
    for key, value in values.items():
        if value is None or isinstance(value, str | bool):
            found[str(key)] = value
            continue
        try:
            found[str(key)] = float(value)
        except (TypeError, ValueError) as error:
            if key == "loss":
                kind = type(value).__name__
                raise UserError(f"{says} a loss that is no number ({kind}): {error}") from None
    if isinstance(found["loss"], str | bool):
        raise UserError(f"{says} loss {found['loss']!r}: it must be a number")
    if math.isfinite(found["loss"]) and not is_loss(found["loss"]):
        raise UserError(f"{says} loss {found['loss']:g}: it must be positive, in nats a token")
    return found


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    seconds: float
    peak_memory_bytes: int
    device: str
    world_size: int


def judge(
    spec: TrialSpec, values: Mapping[str, Any], progress: Progress, cost: Cost
) -> TrialOutcome:
    """The outcome of a run that came to its end with these values: finished, diverged where the
    loss is not finite, stopped where it says (`tokens`) that it did not see its horizon."""
    loss, seen = values["loss"], float(values.get("tokens") or spec.horizon)
    status: Status = "finished"
    reason = None
    if not math.isfinite(loss):
        status, reason = "diverged", "non-finite final loss"
    elif seen < WHOLE * min(spec.horizon, spec.cell.tokens):
        status, reason = "stopped", f"it ended after {seen:.4g} of {spec.cell.tokens:.4g} tokens"
    columns: dict[str, Any] = dict.fromkeys(COLUMNS)
    if progress.loss is not None:
        columns["train_loss"] = progress.loss
    columns |= {k: v for k, v in values.items() if k in COLUMNS}
    metrics = {k: v for k, v in values.items() if k not in (*COLUMNS, "loss", "tokens")}
    return TrialOutcome(
        status=status,
        reason=reason,
        step=round(seen / spec.batch_tokens),
        tokens_seen=round(seen),
        tokens_trained=round(seen),
        loss=loss if status == "finished" else None,
        seconds_train=cost.seconds,
        tokens_per_second=seen / cost.seconds if cost.seconds else 0.0,
        peak_memory_bytes=cost.peak_memory_bytes,
        micro_batch_sequences=None,
        accumulation=None,
        world_size=cost.world_size,
        device=cost.device,
        curve=progress.curve(),
        named_losses={},
        metrics=metrics,
        **columns,
    )


def ended_early(
    spec: TrialSpec, progress: Progress, status: Status, reason: str | None, cost: Cost
) -> TrialOutcome:
    """The outcome of a run that did not come to its end."""
    found = judge(spec, {"loss": math.nan, "tokens": progress.tokens or 1.0}, progress, cost)
    return replace(found, status=status, reason=reason)


def _fail(name: str, error: BaseException, storage: Storage, key: str, world_size: int) -> None:
    """Raise what an error of the function means; its whole traceback goes to the trial's log."""
    lost = world_size > 1 and any(text in str(error) for text in LOST_PEER)
    if lost or isinstance(error, StorageError):
        raise error
    text = "".join(traceback.format_exception(error))
    storage.write(text.encode(), LOGS, f"{key}.log")
    said = f"{type(error).__name__}: {error}{where(error)}"
    if _is_out_of_memory(error):
        raise WorkerOutOfMemory(said) from error
    raise UserError(
        f"training.function {name} raised {said}; traceback: {LOGS}/{key}.log"
    ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" in sys.modules:
        from raysweep.training.runtime import is_out_of_memory

        return is_out_of_memory(error)
    return isinstance(error, MemoryError)


class _Alarm(threading.Thread):
    """Calls `ring` with a reason once the time is over, unless the block ends before."""

    def __init__(self, seconds: float, ring: Callable[[str], object]) -> None:
        super().__init__(name="timeout", daemon=True)
        self._seconds, self._ring, self._over = seconds, ring, threading.Event()

    def run(self) -> None:
        if not self._over.wait(self._seconds):
            self._ring(timeout_reason(self._seconds))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()


TIMEOUT = "took longer than training.timeout"


def timeout_reason(seconds: float) -> str:
    """Why a trial was ended that took too long."""
    return f"{TIMEOUT} ({seconds:g} s)"


def _alarm(seconds: float | None, ring: Callable[[str], object]) -> AbstractContextManager[Any]:
    return _Alarm(seconds, ring) if seconds else nullcontext()


def _clean_slate(spec: TrialSpec) -> AbstractContextManager[Any]:
    """Global state of PyTorch as our own runs find it, where the function's module uses it."""
    if "torch" not in sys.modules:
        return nullcontext()
    import torch

    from raysweep.training import runtime

    resources = spec.cell.resources
    on_gpu = resources.gpus_per_worker and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    share = resources.gpus_per_worker
    return runtime.clean_slate(device, resources.threads, spec.seed, gpu_share=share)


def _peak_memory() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return machine.peak_memory()


def _device(spec: TrialSpec) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and spec.cell.resources.gpus_per_worker and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return machine.cpu_name()
