"""The record of a running study: its trials in flight, and how it goes, kept beside its rows.

Rows are written when trials are over. What is under way stands in one small file, which a thread of
the driver writes anew as trials come and go: the next run takes up every trial in it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from raysweep.errors import UserError
from raysweep.results import Results

WRITE_SECONDS = 0.5
"""Least time between two writes: what changed meanwhile goes into one."""

_log = logging.getLogger("raysweep")


class RunningRecord:
    """Writes the newest record it was given, beside whatever its driver does. Use as a context: the
    last one is written at the end."""

    def __init__(self, results: Results, study: str) -> None:
        self._results, self._study = results, study
        self._newest: Mapping[str, Any] | None = None
        self._given = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="record", daemon=True)

    def keep(self, record: Mapping[str, Any]) -> None:
        """Have a record written soon, in place of the one before."""
        self._newest = record
        self._given.set()

    def __enter__(self) -> RunningRecord:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._given.set()
        self._thread.join()

    def _write_on(self) -> None:
        while not self._over.is_set():
            self._given.wait()
            self._write()
            self._over.wait(WRITE_SECONDS)
        self._write()

    def _write(self) -> None:
        self._given.clear()
        record, self._newest = self._newest, None
        if record is None:
            return
        try:
            self._results.save_running(self._study, record)
        except UserError as error:
            _log.warning("trials in flight were not noted: %s", error)
