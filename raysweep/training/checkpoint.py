"""Checkpoints of a running trial: all or nothing, the newest only, written beside training.

They lie on the study's storage, a folder or an object store, under `checkpoints/KEY/`. Each worker
that holds a part of the model writes that part, in files of bounded size, under one of two names in
turn; once all are through, the first worker replaces `checkpoint.pt`, which says which name counts.
Parts are contiguous stretches of flat tensors, so another number of workers can read what it needs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysweep.errors import UserError
from raysweep.training.optimizer import Parts
from raysweep.training.parallel import Workers

if TYPE_CHECKING:  # training as such needs no Arrow
    from raysweep.results.filesystem import Storage

NAME = "checkpoint.pt"
SLOTS = ("a", "b")
FILE_NUMBERS = 1 << 26
"""Numbers in one file, at most: what is held besides the copy while it is written."""

_log = logging.getLogger("raysweep")


class Checkpoints:
    """The newest checkpoint of one trial, at most one write under way.

    Losing one costs time, never the trial: whatever goes wrong with it is a logged warning. All
    workers of the trial call the same methods in the same order.
    """

    def __init__(self, storage: Storage, key: str, workers: Workers | None = None) -> None:
        self._storage, self._key, self._workers = storage, key, workers or Workers()
        self._folder = _folder(key)
        self._writer: threading.Thread | None = None
        self._head: bytes | None = None
        """Of the checkpoint under way, on the first worker: to be put in place once all have
        written their parts."""
        self._slot = 0
        self.failed = False
        """Whether this worker could not write its part of the one under way."""

    @property
    def writing(self) -> bool:
        """Whether this worker's write is under way."""
        return self._writer is not None and self._writer.is_alive()

    def save(self, state: Mapping[str, Any]) -> None:
        """Copy the state now; a thread writes the copy. Call `commit` once no worker is writing: a
        worker alone does so itself."""
        self.wait()
        if not self._workers.owns:
            state = _without_parts(state)
        copy = snapshot({**state, "key": self._key, "world_size": self._workers.world_size})
        parts = _take_parts(copy)
        slot = SLOTS[self._slot]
        self._slot = 1 - self._slot
        self.failed, self._head = False, None
        if self._workers.rank == 0:
            self._head = _packed({**copy, "slot": slot})
        self._writer = threading.Thread(
            target=self._write, args=(slot, state["step"], parts), name="checkpoint"
        )
        self._writer.start()

    def commit(self, failed: bool) -> None:
        """All workers have written, or one has failed: then the checkpoint before stays."""
        head, self._head = self._head, None
        if head is None or failed:
            return
        try:
            self._storage.write(head, *self._folder, NAME)
        except Exception as error:
            _log.warning("trial %s has no new checkpoint: %s", self._key, error)

    def wait(self) -> None:
        """Return once this worker is writing nothing."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def load(self) -> dict[str, Any] | None:
        """What the first worker saved, but for the parts, if there is a checkpoint that can be
        read."""
        try:
            data = self._storage.read(*self._folder, NAME)
            state = None if data is None else _unpacked(data)
        except Exception as error:
            self._lost(error)
            return None
        if state is None or state["key"] != self._key or "slot" not in state:
            return None  # none, or in the format of an earlier version
        return state

    def load_on_all(self, wanted: Parts) -> dict[str, Any] | None:
        """The checkpoint on all workers, each with the parts that it wants (name, start and length;
        values are not looked at): all of them get it, or none."""
        leader = self._workers.rank == 0
        state = self._workers.from_leader(self.load() if leader else None)
        if state is None:
            return None
        self._slot = 1 - SLOTS.index(state["slot"])
        device = next(iter(wanted.values()))[1].device
        try:
            for prefix, place in _places(state):
                place["parts"] = self._read_parts(state, prefix, wanted)
        except Exception as error:
            self._lost(error)
            state = None
        read_by_all = self._workers.smallest(int(state is not None), device)
        return state if read_by_all else None

    def _read_parts(self, state: Mapping[str, Any], prefix: str, wanted: Parts) -> Parts:
        """Stretches of tensors, put together from the files of whoever wrote them."""
        parts = {
            name: (start, torch.empty(part.shape, dtype=part.dtype))
            for name, (start, part) in wanted.items()
        }
        filled = dict.fromkeys(parts, 0)
        for rank in range(state["world_size"]):
            slot = state["slot"]
            index = self._storage.read(*self._folder, f"{slot}-{rank}.json")
            step, files = json.loads(index or b"[null, {}]")
            if step != state["step"]:
                raise ValueError("it was being written")
            for file, contents in files.items():
                if not any(
                    _overlap(parts.get(name.removeprefix(prefix)), start, length)
                    for name, start, length in contents
                    if name.startswith(prefix)
                ):
                    continue
                data = self._storage.read(*self._folder, file)
                assert data is not None, file
                tensors = _unpacked(data)
                for name, start, length in contents:
                    short = name.removeprefix(prefix)
                    span = _overlap(parts.get(short), start, length)
                    if name.startswith(prefix) and span:
                        first, last = span
                        own_start, own = parts[short]
                        source = tensors[f"{name}@{start}"][first - start : last - start]
                        own[first - own_start : last - own_start] = source
                        filled[short] += last - first
        missing = [name for name, (_, part) in parts.items() if filled[name] != part.numel()]
        if missing:
            raise ValueError(f"it holds no whole {missing[0]}")
        return parts

    def _write(self, slot: str, step: int, parts: Parts) -> None:
        rank = self._workers.rank
        try:
            index: dict[str, list[tuple[str, int, int]]] = {}
            for number, pieces in enumerate(_files(parts)):
                file = f"{slot}-{rank}-{number}.pt"
                index[file] = [(name, start, len(piece)) for name, start, piece in pieces]
                data = _packed({f"{name}@{start}": piece for name, start, piece in pieces})
                self._storage.write(data, *self._folder, file)
            text = json.dumps([step, index]).encode()
            self._storage.write(text, *self._folder, f"{slot}-{rank}.json")
        except Exception as error:
            self.failed = True
            _log.warning("trial %s has no new checkpoint: %s", self._key, error)
        if self._workers.world_size == 1:
            self.commit(self.failed)

    def _lost(self, error: Exception) -> None:
        _log.warning("trial %s starts over: its checkpoint is lost (%s)", self._key, error)


def _places(state: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Where parts belong in a state: in it, and in that of the run that a branch has left."""
    stable_run = state.get("trunk")
    return [("", state)] + ([("stable_run/", stable_run)] if stable_run is not None else [])


def _take_parts(state: dict[str, Any]) -> Parts:
    """Take the parts out of a state, named by where they were."""
    return {
        prefix + name: part
        for prefix, place in _places(state)
        for name, part in place.pop("parts", {}).items()
    }


def _without_parts(state: Mapping[str, Any]) -> dict[str, Any]:
    """For workers that write none: copies of the model are large."""
    left = {name: value for name, value in state.items() if name != "parts"}
    if left.get("trunk") is not None:
        left["trunk"] = _without_parts(left["trunk"])
    return left


def _files(parts: Parts) -> Iterator[list[tuple[str, int, Tensor]]]:
    """Pieces of parts (name, start, piece), by the file."""
    pieces: list[tuple[str, int, Tensor]] = []
    room = FILE_NUMBERS
    for name, (start, part) in parts.items():
        done = 0
        while done < len(part):
            piece = part[done : done + room].clone()  # else all that it is a view of is saved
            pieces.append((name, start + done, piece))
            done, room = done + len(piece), room - len(piece)
            if not room:
                yield pieces
                pieces, room = [], FILE_NUMBERS
    if pieces:
        yield pieces


def _overlap(part: tuple[int, Tensor] | None, start: int, length: int) -> tuple[int, int] | None:
    """The range in which a part and a stretch overlap; None if they do not."""
    if part is None:
        return None
    first, last = max(part[0], start), min(part[0] + len(part[1]), start + length)
    return (first, last) if first < last else None


def _packed(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


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
        storage.delete_folder(*_folder(key))


def _folder(key: str) -> tuple[str, str]:
    from raysweep.results.store import CHECKPOINTS  # which needs Arrow, as a storage does

    return CHECKPOINTS, key


class Timer:
    """Says when the next checkpoint is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def waits(self) -> bool:
        """Whether `seconds` have passed since the last one; never if that is zero."""
        return self.seconds > 0 and time.monotonic() - self.last >= self.seconds

    def restart(self) -> None:
        """Count from now."""
        self.last = time.monotonic()

    def due(self) -> bool:
        """True once every `seconds`: then it counts from now."""
        waits = self.waits()
        if waits:
            self.restart()
        return waits
