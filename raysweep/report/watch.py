"""watch(uri, folder): a page kept up to date while trials land, at a bounded cost.

The page asks a small script beside it, `live.js`, whether there is a newer one: that works from
disk, where a page may read nothing else. Whoever watches says there which page is the newest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from raysweep.report.page import report
from raysweep.report.render import replace_file
from raysweep.results.progress import CellProgress, progress
from raysweep.results.schema import FINISHED
from raysweep.results.store import RUNS, STUDIES, TRIALS, Results

LIVE = "live.js"
SHARE = 0.1
"""Share of the time that building may take: a page of 5 s is built every 50 s at most."""
LEAST = 10.0
"""Seconds between two builds, however quick they are."""
POLL, POLL_FAR = 2.0, 15.0
"""Seconds between two looks at a local folder and at an object store."""
BEAT = 20.0
"""Seconds between two signs of life to open pages."""

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Say = Callable[[str], None]
Pause = Callable[[float], bool]
"""Waits so many seconds, and says whether to end."""


def watch(
    uri: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    png: bool = False,
    pause: Pause | None = None,
    say: Say = lambda _: None,
) -> Path:
    """Build the page of a results folder again whenever rows land; return its path at the end.

    Ends when a run of the study ends, or where all that is planned is there already; the page that
    stands then is the last one. Ends as well when `pause` says so, and by KeyboardInterrupt: then
    the page stays as it was built last, live no more. While nothing changes only the names of files
    are read, and building takes at most `SHARE` of the time. Raises UserError where there are no
    results.
    """
    results = Results.open(uri)
    pause = pause or _sleep
    poll = POLL if results.storage.is_local else POLL_FAR
    target = Path(folder)
    runs = _names(results, RUNS)
    ended = _complete(progress(results.uri))
    stamp = built = ""
    not_before = beat = -math.inf
    try:
        while not ended:
            mark = _mark(results)
            begun = time.monotonic()
            if mark != built and begun >= not_before:
                stamp, built = f"{mark[:12]}-{time.time_ns():x}", mark
                page = report(results, target, png=png, live=_live(results, stamp))
                seconds = time.monotonic() - begun
                not_before = time.monotonic() + max(LEAST, seconds * (1 / SHARE - 1))
                beat = -math.inf
                say(f"{datetime.now():%H:%M:%S}  {page}, built in {seconds:.1f} s")
            if time.monotonic() - beat > BEAT:
                beat = time.monotonic()
                _beat(target, stamp)
            if pause(poll):
                return target / "index.html"
            ended = _names(results, RUNS) != runs
        return report(results, target, png=png)
    finally:
        end_live(target)


@contextmanager
def kept_live(uri: str, folder: str | os.PathLike[str]) -> Iterator[Callable[[], None]]:
    """A page kept up to date for the time of the block, by a process of low priority.

    It takes what processor time others leave, and ends with this process, however that ends. Yields
    a function that ends it at once, for whoever writes the last page; at the end of the block the
    page is live no more, and open ones load what stands there.
    """
    command = [sys.executable, "-m", "raysweep", "report", uri, "-o", os.fspath(folder)]
    child = subprocess.Popen(
        [*command, "--watch", "--until-eof"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **dict.fromkeys(ONE_THREAD, "1")},
        start_new_session=True,  # Ctrl-C is for the study; this process ends after it
    )

    def settle() -> None:
        assert child.stdin is not None
        child.stdin.close()
        child.terminate()
        child.wait()

    try:
        yield settle
    finally:
        settle()
        end_live(folder)


def until_eof(seconds: float) -> bool:
    """Wait so long, and say whether standard input has ended: a pipe ends with its writer."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1024)


def end_live(folder: str | os.PathLike[str]) -> None:
    """Make a page live no more, without building it again; open ones load it once more."""
    page = Path(folder) / "index.html"
    try:
        html = page.read_text(encoding="utf-8")
    except OSError:
        html = ""
    dead = re.sub(r'<body data-live="[^"]*">', "<body>", html, count=1)
    if dead != html:
        replace_file(page, dead.encode())
    (Path(folder) / LIVE).unlink(missing_ok=True)


def _live(results: Results, stamp: str) -> dict[str, Any]:
    """What a live page needs beside what every page has."""
    cells = progress(results.uri)
    script = files("raysweep.report") / "templates" / "refresh.js"
    return {
        "stamp": stamp,
        "at": f"{datetime.now():%H:%M:%S}",
        "script": Markup(script.read_text(encoding="utf-8")),
        "studies": [
            _study(name, [c for c in cells if c.study == name])
            for name in dict.fromkeys(c.study for c in cells)
        ],
    }


def _study(name: str, cells: Sequence[CellProgress]) -> dict[str, Any]:
    rows = [
        {
            "cell": c.cell,
            "done": sum(c.statuses.values()),
            "wanted": c.wanted,
            "finished": c.statuses.get(FINISHED, 0),
            "best_loss": c.best_loss,
        }
        for c in cells
    ]
    return {
        "name": name,
        "cells": rows,
        "done": sum(r["done"] for r in rows),
        "wanted": sum(r["wanted"] or 0 for r in rows),
        "complete": sum(r["wanted"] is not None and r["done"] >= r["wanted"] for r in rows),
    }


def _complete(cells: Sequence[CellProgress]) -> bool:
    """Whether all that is planned has been done; not where nothing is."""
    wanted = [c for c in cells if c.wanted is not None]
    return bool(wanted) and all(sum(c.statuses.values()) >= (c.wanted or 0) for c in wanted)


def _names(results: Results, folder: str) -> frozenset[str]:
    return frozenset(i.base_name for i in results.storage.list(folder))


def _mark(results: Results) -> str:
    """Changes when a row does: of the names, sizes and times of files."""
    found = [
        (folder, i.base_name, i.size, i.mtime_ns)
        for folder in (TRIALS, STUDIES, RUNS)
        for i in results.storage.list(folder)
    ]
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _beat(folder: Path, stamp: str) -> None:
    """Tell open pages which one is the newest, and that somebody is here."""
    said = json.dumps({"stamp": stamp, "at": time.time()})
    replace_file(folder / LIVE, f"raysweepLive({said});\n".encode())


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
