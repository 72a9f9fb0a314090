"""One driver a results folder: two would give the same trials out twice."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.results.lease import lease

LOCK = ".driver.lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Said by file systems without locks: NFS without its lock daemon, Lustre without -o flock."""


@contextmanager
def study_lock(storage: Storage) -> Iterator[None]:
    """Hold a results folder for the time of the block.

    The kernel drops the lock when the process ends, however it ends, so no lock is ever stale.
    Object stores have no such lock, nor have some shared folders; there a lease stands for it.
    Should two drivers ever run at once, they waste work but lose nothing, since a trial's row is
    named by its key. Raises UserError if another run holds the folder.
    """
    kernel = _kernel_lock(storage) if storage.is_local else nullcontext(False)
    with kernel as locked, nullcontext() if locked else lease(storage):
        yield


@contextmanager
def _kernel_lock(storage: Storage) -> Iterator[bool]:
    """Hold the lock; False where the folder's file system has none. Raises UserError."""
    path = Path(storage.path(LOCK))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 100).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{storage.uri} is in use by {holder}: wait for it, or name another --results"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(
                    f"cannot lock {path}: {error.strerror}: mend that, or name another --results"
                ) from error
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield True
    finally:
        os.close(descriptor)
