"""What the shell offers after Tab: search-space files, results folders, formats, cells, GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

HIDDEN = "."


def spaces(incomplete: str) -> list[str]:
    """Search-space files, and the folders that may hold them."""
    return [
        name
        for name, path in _under(incomplete)
        if path.is_dir() or path.suffix in (".yaml", ".yml")
    ]


def paths(incomplete: str) -> list[str]:
    """Files and folders."""
    return [name for name, _ in _under(incomplete)]


def results(incomplete: str) -> list[str]:
    """Folders, results folders first."""
    folders = [(name, path) for name, path in _under(incomplete) if path.is_dir()]
    ours = [name.rstrip("/") for name, path in folders if (path / "raysweep.json").exists()]
    return ours or [name for name, _ in folders]


def _under(incomplete: str) -> Iterator[tuple[str, Path]]:
    """(as it is typed, path) of what begins with `incomplete`; folders end with a slash."""
    typed, _, begun = incomplete.rpartition("/")
    prefix = typed + "/" if "/" in incomplete else ""
    folder = Path(prefix or ".").expanduser()
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(begun) and (begun or not path.name.startswith(HIDDEN)):
            yield prefix + path.name + ("/" if path.is_dir() else ""), path


def cells(incomplete: str) -> list[str]:
    """The cells of the study that stands on the line.

    An option that still waits for its value keeps Typer from telling the arguments before it, so
    the line is read as the shell hands it over: in COMP_WORDS (bash) or _TYPER_COMPLETE_ARGS."""
    from raysweep.errors import UserError
    from raysweep.study import Study

    line = [os.environ.get(name, "") for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")]
    for word in " ".join(line).split():
        if word.endswith((".yaml", ".yml")):
            try:
                study = Study.load(word)
            except (UserError, OSError):
                return []  # the command itself will say what is wrong with the file
            return [cell.name for cell in study.cells if cell.name.startswith(incomplete)]
    return []


def import_formats(incomplete: str) -> list[str]:
    """What `import` reads."""
    from raysweep.results.importers import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


def export_formats(incomplete: str) -> list[str]:
    """What `export` writes."""
    return [name for name in ("optuna",) if name.startswith(incomplete)]


def gpus(incomplete: str) -> list[str]:
    """GPUs whose data sheets `serving` knows."""
    from raysweep.scaling.compute.roofline import GPUS

    return [name for name in GPUS if name.startswith(incomplete)]


def published_laws(incomplete: str) -> list[str]:
    """Keys of the published laws that the prior is made of."""
    from raysweep.scaling.optima.literature import PUBLISHED_LAWS

    return [name for name in PUBLISHED_LAWS if name.startswith(incomplete)]
