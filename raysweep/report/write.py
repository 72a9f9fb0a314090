"""write_report: the page of results wherever they are; what `raysweep.report(...)` calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysweep.errors import UserError
from raysweep.results.store import Results
from raysweep.scaling.fits import Fits


def write_report(
    results: str | os.PathLike[str] | Results,
    folder: str | os.PathLike[str] | None = None,
    *,
    fits: Fits | None = None,
    title: str | None = None,
    png: bool = False,
    live: Mapping[str, Any] | None = None,
    asked: Sequence[tuple[float | str, float | str]] = (),
) -> Path:
    """Fit results, a folder or URI, opened or not, and write their page; see `page.report`."""
    from raysweep.report.page import report  # what draws is loaded when a page is made

    if not isinstance(results, Results):
        results = Results.open(results)
    if folder is not None:
        check_folder(Path(folder))
    return report(results, folder, fits=fits, title=title, png=png, live=live, asked=asked)


def opening_answers(results: Results, fits: Fits) -> list[str]:
    """What the page opens with, for a terminal: no published laws, which the page shows."""
    from raysweep.report.answers import ask
    from raysweep.report.facts import studies

    answers = ask(fits, studies(results.to_pandas(), results.search_spaces()))
    return [str(replace(a.run, published=())) for a in answers]


def check_folder(folder: Path) -> None:
    """Raises UserError where no folder can be, before any work is done for it."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder")
