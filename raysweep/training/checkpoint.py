"""Checkpoints of a running trial: written atomically, only the newest kept."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the folder's checkpoint; a reader sees the old one or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{NAME}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def load(folder: Path, key: str) -> dict[str, Any] | None:
    """The folder's checkpoint, on the CPU, if it has one of this trial key."""
    path = folder / NAME
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state if state["key"] == key else None


def remove(folder: Path) -> None:
    """Forget the checkpoint, and whatever half-written one a killed process left."""
    for path in folder.glob(f"{NAME}*"):
        path.unlink(missing_ok=True)


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
