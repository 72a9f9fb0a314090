"""One driver a results folder: two would give the same trials out twice."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.results.lease import lease

LOCK = ".driver.lock"


@contextmanager
def study_lock(storage: Storage) -> Iterator[None]:
    """Hold a results folder for the time of the block.

    The kernel drops the lock when the process ends, however it ends, so no lock is ever stale.
    Object stores have no such lock; there a lease stands for it. Should two drivers ever run at
    once, they waste work but lose nothing, since a trial's row is named by its key. Raises
    UserError if another run holds the folder.
    """
    if not storage.is_local:
        with lease(storage):
            yield
        return
    path = Path(storage.path(LOCK))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 100).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{storage.uri} is in use by {holder}: wait for it, or name another --results"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
