"""Folders in the user's cache that appear whole or not at all, whoever else builds them."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from raysweep.errors import UserError

T = TypeVar("T")

_WORK, _STALE_SECONDS = ".building-", 86400.0


def root(given: Path | None = None) -> Path:
    """`given`, else $RAYSWEEP_CACHE, else raysweep in $XDG_CACHE_HOME or ~/.cache."""
    if given is not None:
        return given
    if own := os.environ.get("RAYSWEEP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "raysweep"


def get_or_build(
    parent: Path,
    name: str,
    *,
    find: Callable[[Path], T | None],
    build: Callable[[Path], None],
) -> T:
    """What `find` makes of the folder `parent/name`, built first where it finds nothing.

    `build` fills an empty working folder, which is flushed to disk and renamed into place. One
    process builds at a time; others that want the same folder wait for it and take its result.
    Raises UserError where the cache cannot be written.
    """
    final = parent / name
    if (found := find(final)) is not None:
        return found
    work = parent / f"{_WORK}{name}-{uuid.uuid4().hex[:8]}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _lock(parent / f".lock-{name}"):
            if (found := find(final)) is not None:
                return found
            _remove_stale(parent)
            work.mkdir()
            build(work)
            for file in work.iterdir():
                _flush(file)
            _flush(work)
            _clear(final)
            work.rename(final)
            _flush(parent)
            found = find(final)
    except OSError as error:
        raise UserError(
            f"cannot write the corpus cache {parent} ({error.strerror or error}): set "
            "RAYSWEEP_CACHE to a folder with space"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if found is None:
        raise UserError(f"what was written to {final} cannot be read back: check the disk")
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear(final: Path) -> None:
    """Take a damaged folder out of the way in one step, then delete it."""
    aside = final.with_name(f"{_WORK}old-{uuid.uuid4().hex[:8]}")
    try:
        final.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Delete what processes killed more than a day ago left behind."""
    for folder in parent.glob(f"{_WORK}*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
