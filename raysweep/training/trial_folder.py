"""The folder that a trial of a user's own training has to itself, on the study's storage."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from raysweep.data import cache_folder
from raysweep.results.filesystem import Storage
from raysweep.results.store import CHECKPOINTS

KEPT = "kept"
"""Folder of the results that holds the folders of finished trials, where they are kept."""


@dataclass(frozen=True)
class TrialFolder:
    """Where a trial keeps what it needs to go on: the results' own folder where that is one on
    this machine, else one here that is sent to the storage and fetched from it."""

    storage: Storage
    key: str
    kept: bool = False
    """Whether it stays when the trial is over: then it has another place than checkpoints have."""

    @property
    def _root(self) -> str:
        return KEPT if self.kept else CHECKPOINTS

    @property
    def path(self) -> Path:
        if self.storage.is_local:
            return Path(self.storage.path(self._root, self.key))
        return cache_folder.root() / "trials" / self.key

    def open(self) -> Path:
        """The folder, made if need be, with what an earlier start left in it."""
        path = self.path
        path.mkdir(parents=True, exist_ok=True)
        if not self.storage.is_local:
            for name in self._files():
                target = path / name
                data = self.storage.read(self._root, self.key, name)
                if data is not None and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
        return path

    def save(self) -> None:
        """Send what is in it to the storage; what has gone here goes there too."""
        if self.storage.is_local:
            return
        here = {p.relative_to(self.path).as_posix(): p for p in self.path.rglob("*") if p.is_file()}
        for name, path in here.items():
            self.storage.write(path.read_bytes(), self._root, self.key, name)
        for name in set(self._files()) - set(here):
            self.storage.delete(self._root, self.key, name)

    def forget(self) -> None:
        """Remove it, here and there."""
        self.storage.delete_folder(self._root, self.key)
        if not self.storage.is_local:
            shutil.rmtree(self.path, ignore_errors=True)

    def _files(self, *inside: str) -> list[str]:
        """Paths of all files that the storage has of it."""
        at = (self._root, self.key, *inside)
        found = ["/".join((*inside, i.base_name)) for i in self.storage.list(*at)]
        for folder in self.storage.folders(*at):
            found += self._files(*inside, folder)
        return found
