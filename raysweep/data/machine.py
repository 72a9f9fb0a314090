"""The default corpus: Python sources and documentation of this Python and its packages."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raysweep.data.near_duplicates import NearDuplicates
from raysweep.data.sources import ReadStats, decode_problem, normalise_newlines, walk

MAX_MEGABYTES = 48.0
"""How much is read unless the search-space file says otherwise."""
SUFFIXES = (".py", ".rst", ".md", ".txt")
"""Stubs (.pyi) are left out: most are written by generators and repeat each other."""

_SHORTEST, _LONGEST = 256, 2**20
_LONGEST_LINE = 2000
_MEAN_LINE = 120
_DIGIT_SHARE = 0.2
_ENCODED_SHARE = 0.05
_ENCODED = re.compile(rb"[A-Za-z0-9+/]{64,}")


def read_machine(stats: ReadStats) -> Iterator[bytes]:
    """Documents, one a file: the standard library first, then the packages.

    Within each the order is that of a hash of the file's name, so that any first part of it is a
    fair sample, and the same on machines with the same packages. Generated data and near
    duplicates of earlier documents are left out.
    """
    passed = NearDuplicates()
    for root in _roots():
        for path in _by_name_hash(root):
            try:
                text = path.read_bytes()
            except OSError:
                stats.dropped["unreadable"] += 1
                continue
            problem = decode_problem(text) or unfit(text)
            if problem is None:
                text = normalise_newlines(text).replace(b"\0", b"")
                problem = "near duplicate" if passed.seen(text) else None
            if problem is None:
                stats.files += 1
                yield stats.keep(text)
            else:
                stats.dropped[problem] += 1


def unfit(text: bytes) -> str | None:
    """Why a file does not look like text that a person wrote; None if it does."""
    if len(text) < _SHORTEST:
        return "shorter than 256 bytes"
    if len(text) > _LONGEST:
        return "longer than 1 MiB"
    codes = np.frombuffer(text, dtype=np.uint8)
    line_ends = np.flatnonzero(codes == ord("\n"))
    longest = np.diff(line_ends, prepend=-1, append=len(codes)).max()
    if longest > _LONGEST_LINE or len(codes) / (len(line_ends) + 1) > _MEAN_LINE:
        return "long lines"
    counts = np.bincount(codes, minlength=256)
    blank = counts[[ord(c) for c in " \t\r\n"]].sum()
    if counts[ord("0") : ord("9") + 1].sum() > _DIGIT_SHARE * (len(codes) - blank):
        return "mostly digits"
    if sum(map(len, _ENCODED.findall(text))) > _ENCODED_SHARE * len(codes):
        return "encoded data"
    return None


def machine_identity() -> list[object]:
    """What changes when a package or Python does, read without walking their files."""
    entries: list[object] = [sys.version]
    for root in _roots():
        with os.scandir(root) as scan:
            records = [
                (entry.name, entry.stat().st_mtime_ns)
                for entry in scan
                if entry.name.endswith((".dist-info", ".egg-info"))
            ]
        entries.append([str(root), sorted(records)])
    return entries


def _roots() -> list[Path]:
    """Folder of the standard library, then of the installed packages."""
    names = ("stdlib", "purelib", "platlib")
    folders = (Path(sysconfig.get_path(name)).resolve() for name in names)
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _by_name_hash(root: Path) -> list[Path]:
    skip = {"__pycache__", "site-packages", "dist-packages"}
    # What a build of Python writes about its own machine differs between machines.
    skip |= {d.name for d in root.glob("config-*")}
    found = [
        path
        for path in walk(root, skip)
        if (path.suffix in SUFFIXES or path.name == "METADATA")
        and not path.name.startswith("_sysconfigdata")
    ]
    names = {path: path.relative_to(root).as_posix().encode() for path in found}
    return sorted(found, key=lambda path: hashlib.sha256(names[path]).digest())
