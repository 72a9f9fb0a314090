"""One driver a study where no kernel keeps locks: a lease, an object that its holder renews.

Clocks of hosts are never compared. A driver that meets a lease watches it: one that changes is
alive; one that stays the same for `LAPSE_SECONDS` of the watcher's own clock belongs to a driver
that is gone, and is taken over. PyArrow has no conditional writes, so whoever takes a lease reads
it back after a while; of two that took it at once, the last to write has it. Every renewal reads
first, so a holder that slept through its lapse sees that it was taken over, and ends its run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage

LEASE = ".driver.lease"
RENEW_SECONDS = 5.0
LAPSE_SECONDS = 60.0
"""Far longer than storage may be away: retries of one write take six seconds."""
SETTLE_SECONDS = 2.0

_log = logging.getLogger("raysweep")


@contextmanager
def lease(storage: Storage) -> Iterator[None]:
    """Hold the lease of a results folder for the time of the block.

    A lease that lapsed costs a wait of a minute. If another driver takes this one over, the block
    is ended as by SIGTERM. Raises UserError where another run holds it, or has taken it over.
    """
    nonce = _acquire(storage)
    over = threading.Event()
    taken_by: list[str] = []
    renewing = threading.Thread(
        target=_renew, args=(storage, nonce, over, taken_by), name="lease", daemon=True
    )
    renewing.start()
    try:
        yield
    except KeyboardInterrupt:
        if taken_by:
            raise UserError(
                f"{storage.uri} was taken over by {taken_by[0]} while this process was away: "
                "finished trials are kept, leave the rest to it"
            ) from None
        raise
    finally:
        over.set()
        renewing.join()
        with suppress(UserError):  # it lapses by itself
            if _holder(storage.read(LEASE))[1] == nonce:
                storage.delete(LEASE)


def _acquire(storage: Storage) -> str:
    _wait_out(storage)
    nonce = uuid.uuid4().hex
    _write(storage, nonce, 0)
    time.sleep(SETTLE_SECONDS)
    holder, standing = _holder(storage.read(LEASE))
    if standing != nonce:
        raise _in_use(storage, holder)
    return nonce


def _wait_out(storage: Storage) -> None:
    """Wait until there is no lease, or its holder has not renewed it for `LAPSE_SECONDS`."""
    first = storage.read(LEASE)
    begun = time.monotonic()
    told = False
    while first is not None and time.monotonic() - begun < LAPSE_SECONDS:
        time.sleep(RENEW_SECONDS / 2)
        now = storage.read(LEASE)
        if now is None:
            return
        if now != first:
            raise _in_use(storage, _holder(now)[0])
        if not told and time.monotonic() - begun > 3 * RENEW_SECONDS:
            told = True
            _log.warning(
                "%s is leased to %s, which seems to be gone: waiting %.0f s to be sure",
                *(storage.uri, _holder(first)[0], LAPSE_SECONDS),
            )


def _renew(storage: Storage, nonce: str, over: threading.Event, taken_by: list[str]) -> None:
    beat = 0
    while not over.wait(RENEW_SECONDS):
        beat += 1
        try:
            standing = storage.read(LEASE)
            holder, other = _holder(standing)
            if standing is None or other == nonce:
                _write(storage, nonce, beat)
                continue
        except UserError as error:
            _log.warning("the lease could not be renewed: %s", error)
            continue
        taken_by.append(holder)
        os.kill(os.getpid(), signal.SIGTERM)
        return


def _write(storage: Storage, nonce: str, beat: int) -> None:
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    content = {"holder": holder, "nonce": nonce, "beat": beat}
    storage.write(json.dumps(content).encode(), LEASE)


def _holder(content: bytes | None) -> tuple[str, str | None]:
    """Who holds a lease, in words, and its nonce."""
    try:
        values = json.loads(content or b"")
        return str(values["holder"]), str(values["nonce"])
    except (ValueError, KeyError, TypeError):
        return "another process", None


def _in_use(storage: Storage, holder: str) -> UserError:
    return UserError(
        f"{storage.uri} is in use by {holder}: wait for it, or name another --results (its lease "
        f"ends with its run, or {LAPSE_SECONDS:.0f} s after its last sign of life)"
    )
