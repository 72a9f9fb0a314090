"""Checkpoints of a running trial: all or nothing, the newest only, written beside training.

They lie on the study's storage, a folder or an object store, under `checkpoints/KEY/`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from typing import Any

import torch
from torch import Tensor

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.results.store import CHECKPOINTS
from raysweep.training.parallel import Workers

NAME = "checkpoint.pt"

_log = logging.getLogger("raysweep")


class Checkpoints:
    """The newest checkpoint of one trial, at most one write under way.

    Losing one costs time, never the trial: whatever goes wrong with it is a logged warning.
    """

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._writer: threading.Thread | None = None

    @property
    def writing(self) -> bool:
        """Whether a write is under way."""
        return self._writer is not None and self._writer.is_alive()

    def save(self, state: dict[str, Any]) -> None:
        """Copy the state now; a thread replaces the checkpoint by the copy, once the write
        before it is through."""
        self.wait()
        copy = {"key": self._key, **snapshot(state)}
        self._writer = threading.Thread(target=self._write, args=(copy,), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, on the CPU, if there is one that can be read."""
        try:
            data = self._storage.read(CHECKPOINTS, self._key, NAME)
            if data is None:
                return None
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            _log.warning("trial %s starts over: its checkpoint is lost (%s)", self._key, error)
            return None
        return state if state["key"] == self._key else None

    def load_on_all(self, workers: Workers) -> dict[str, Any] | None:
        """The checkpoint on all workers, read by the first. That one alone gets what a sharded
        model has learned: it is too large to be everywhere."""
        if workers.rank:
            return workers.from_leader(None)
        state = self.load()
        if state is not None and state.get("sharded") != workers.sharded:
            _log.warning("trial %s starts over: its checkpoint is of other workers", self._key)
            state = None
        workers.from_leader(_without_learned(state) if state and workers.sharded else state)
        return state

    def _write(self, state: dict[str, Any]) -> None:
        try:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            self._storage.write(buffer.getvalue(), CHECKPOINTS, self._key, NAME)
        except Exception as error:
            _log.warning("trial %s has no new checkpoint: %s", self._key, error)


def _without_learned(state: dict[str, Any]) -> dict[str, Any]:
    """The small part of a run's state, and of the trunk's in it."""
    trunk = state["trunk"] and _without_learned(state["trunk"])
    return {**state, "learned": None, "trunk": trunk}


def snapshot(state: Any) -> Any:
    """A copy, its tensors on the CPU, that training no longer touches."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


def forget(storage: Storage, key: str) -> None:
    """Remove a trial's checkpoint, and whatever half-written one a killed process left.

    Call it once the trial's row is written: a process lost before that needs the checkpoint.
    """
    with contextlib.suppress(UserError):  # the storage fails: the study sweeps up in the end
        storage.delete_folder(CHECKPOINTS, key)


class Timer:
    """Says when the next checkpoint is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def due(self) -> bool:
        """True once every `seconds`; never if that is zero."""
        now = time.monotonic()
        if not self.seconds or now - self.last < self.seconds:
            return False
        self.last = now
        return True
