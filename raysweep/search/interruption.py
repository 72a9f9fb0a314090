"""Ending a run in good order on SIGINT and SIGTERM: nothing finished is lost, the rest goes on."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any

from raysweep.training.supervisor import descendants

GRACE_SECONDS = 25.0
"""What running trials get to finish or to leave a checkpoint."""
INTERRUPTED = "interrupted"
"""Status that a trial reports which has left a checkpoint. It writes no row: it is not over."""
ASK_SECONDS = 1.0
"""Least time between two looks of a trial at what its driver wants."""

_NAMESPACE = "raysweep"
_ALL = b"*"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal. Its text says how to continue."""

    def __init__(self, signum: int) -> None:
        super().__init__("run the same command again to continue")
        self.exit_code = 128 + signum


class Interruption:
    """Listens for signals while a study runs. Off the main thread, where none arrive, it is idle.

    The first signal raises Interrupted, unless trials run (`defer_signals`): then it is noted, and
    the driver winds down. The second ends the process at once, and a local Ray with it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came, if one did."""
        self._since = 0.0
        self._gentle = False

    @property
    def overdue(self) -> bool:
        """Whether trials have had their time."""
        return self.signum is not None and time.monotonic() - self._since > GRACE_SECONDS

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interruption]:
        """Hear signals for the time of the block."""
        before: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread
            for each in _SIGNALS:
                before[each] = signal.signal(each, self._heard)
        try:
            yield self
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    @contextlib.contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Only note the first signal for the time of the block. Ray, once started, listens for
        SIGTERM itself: here it is our turn again."""
        with self.listening():
            self._gentle = True
            try:
                yield
            finally:
                self._gentle = False

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            os.write(2, b"ended at once: run the same command again to continue\n")
            for pid in descendants():  # a local Ray's agents would linger for minutes
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(128 + signum)
        self.signum, self._since = signum, time.monotonic()
        if not self._gentle:
            raise Interrupted(signum)


def tell_trials_to_stop() -> None:
    """Let the trials of this Ray job know that they should leave a checkpoint and return."""
    from raysweep.search.ray_internals import put_word

    put_word(_key(), _ALL, _NAMESPACE)


def tell_trials_to_leave(nodes: Collection[str]) -> None:
    """Let those on these nodes know that they should leave a checkpoint, and go on elsewhere."""
    from raysweep.search.ray_internals import put_word

    put_word(_key(), ",".join(sorted(nodes)).encode(), _NAMESPACE)


class StopRequest:
    """What a trial asks: whether its driver wants it to stop, or to go on elsewhere."""

    def __init__(self) -> None:
        self.leaves = False
        """Whether it should stop because its node is about to go."""
        self._asked = -math.inf
        self._answer = False

    def __call__(self) -> bool:
        """Ask the head, which all nodes reach; one that is away has asked for nothing."""
        from raysweep.search.ray_internals import get_word

        now = time.monotonic()
        if not self._answer and now - self._asked >= ASK_SECONDS:
            self._asked = now
            word = get_word(_key(), _NAMESPACE) or b""
            self.leaves = word != _ALL and _node() in word.decode().split(",")
            self._answer = self.leaves or word == _ALL
        return self._answer


def _node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _key() -> str:
    import ray

    return f"stop:{ray.get_runtime_context().get_job_id()}"
