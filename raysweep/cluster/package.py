"""What travels to a cluster: the code and the search space; no results, caches or secrets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from raysweep.data.sources import walk
from raysweep.errors import UserError
from raysweep.study import Study
from raysweep.text import size

MAX_PACKAGE_BYTES = 50_000_000
"""Ray keeps packages in the head's memory and refuses those beyond some hundred megabytes."""

AT_THE_ROOT = {"results", "reports", "tests", "build", "dist"}
EVERYWHERE = (
    ".*",  # .git, .venv, .env and every cache of a tool
    "__pycache__",
    "*.pyc",
    "*.egg-info",
    "node_modules",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "auth_token*",
    "credentials*",
    "kubeconfig*",
    "*service_account*.json",
    "*service-account*.json",
)
"""Left behind, wherever they lie."""

Files = dict[str, Path]
"""Where a file lies in the package, and here."""


def collect(space: Path, study: Study, *, leave_out: tuple[Path, ...] = ()) -> tuple[Files, str]:
    """The files that a study needs on a cluster, and the search space's place among them.

    They are the checkout that holds this package (the package alone where it is installed), the
    search-space file, data that it names by relative path, and where the user's own code trains all
    that lies beside the file. Raises UserError where such data
    lies outside of the checkout, or the whole is too large.
    """
    package = Path(__file__).resolve().parents[1]
    root = package.parent
    if (root / "pyproject.toml").is_file():
        files = {p.relative_to(root).as_posix(): p for p in _walk(root, top=True)}
    else:
        files = {p.relative_to(root).as_posix(): p for p in _walk(package)}
    space = space.resolve()
    inside = space.is_relative_to(root)
    place = space.relative_to(root).as_posix() if inside else f"submitted/{space.name}"
    files[place] = space
    if study.space.training is not None and not inside:
        own = _walk(space.parent, top=True)
        files |= {f"submitted/{p.relative_to(space.parent).as_posix()}": p for p in own}
    for name in _data_files(study):
        data = (study.folder / name).resolve()
        if not data.exists():
            raise UserError(
                f"data path {name} not found at {data}: correct it, or make it absolute"
            )
        if not (inside and data.is_relative_to(root)):
            raise UserError(
                f"data path {name} lies outside of {root} and does not travel: name an absolute "
                "path that the head of the cluster sees"
            )
        found = walk(data) if data.is_dir() else [data]
        files |= {p.relative_to(root).as_posix(): p for p in found}
    left = {p.resolve() for p in leave_out}
    files = {name: path for name, path in files.items() if path.resolve() not in left}
    _check_size(files)
    return files, place


def stage(files: Files, folder: Path) -> None:
    """Copy the files to a folder that holds nothing else."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _walk(folder: Path, *, top: bool = False) -> Iterator[Path]:
    """Files below a folder; neither links nor virtual environments are followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if any(fnmatch(entry.name, pattern) for pattern in EVERYWHERE):
                continue
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if (top and entry.name in AT_THE_ROOT) or (path / "pyvenv.cfg").exists():
                    continue
                yield from _walk(path)
            elif entry.is_file(follow_symlinks=False):
                yield path


def _data_files(study: Study) -> list[str]:
    """Relative paths of data and tokenizer in a search space."""
    data = study.space.data
    tokenizer = None if data.tokenizer == "bytes" else data.tokenizer.file
    held_out = [path for paths in data.held_out for path in paths]
    named = (*data.paths, *held_out, *([tokenizer] if tokenizer else []))
    return [name for name in named if not os.path.isabs(os.path.expanduser(name))]


def _check_size(files: Files) -> None:
    sizes: dict[str, int] = {}
    for name, path in files.items():
        entry = "/".join(name.split("/")[:2])
        sizes[entry] = sizes.get(entry, 0) + path.stat().st_size
    total = sum(sizes.values())
    if total <= MAX_PACKAGE_BYTES:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} ({size(n)})" for name, n in largest)
    raise UserError(
        f"the code to send is {size(total)}, over {size(MAX_PACKAGE_BYTES)}; "
        f"largest: {named}: move them out of the checkout"
    )
