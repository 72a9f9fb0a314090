"""write_report: the page of results wherever they are, in a folder of its own by default."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysweep.errors import UserError
from raysweep.results.store import Results
from raysweep.scaling.fits import Fits

REPORTS = "reports"


def write_report(
    results: str | os.PathLike[str] | Results,
    folder: str | os.PathLike[str] | None = None,
    *,
    fits: Fits | None = None,
    title: str | None = None,
    png: bool = False,
    live: Mapping[str, Any] | None = None,
) -> Path:
    """Fit results and write `folder/index.html`, one file that needs nothing else; its path.

    `results` is a folder or URI, opened or not; `folder` is `reports/STUDY` by default. `fits` are
    those of these results, where they have been made already; `title` stands for the names of the
    studies. With `png`, each figure is written beside it too. `live` is what `watch` adds to a page
    that it keeps up to date.
    """
    from raysweep.report.page import report  # what draws is loaded when a page is made

    if not isinstance(results, Results):
        results = Results.open(results)
    target = report_folder(results) if folder is None else Path(folder)
    check_folder(target)
    return report(results, target, fits=fits, title=title, png=png, live=live)


def report_folder(results: Results) -> Path:
    """`reports/STUDY`, or after the results folder where it holds several studies or none."""
    studies = list(dict.fromkeys(results.to_pandas()["study"].astype(str)))
    name = studies[0] if len(studies) == 1 else results.uri.rstrip("/").split("/")[-1]
    return Path(REPORTS) / (re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "results")


def check_folder(folder: Path) -> None:
    """Raises UserError where no folder can be, before any work is done for it."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder")
