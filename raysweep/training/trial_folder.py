"""The folder that a trial of a user's own training has to itself, on the study's storage."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from raysweep.data import cache_folder
from raysweep.results.filesystem import Storage
from raysweep.results.store import CHECKPOINTS

KEPT = "kept"
"""Folder of the results that holds the folders of finished trials, where they are kept."""
SAVED = "saved.json"
"""In an object store, which of the copies of a trial's folder counts, and its files: written last,
so that whoever reads it finds all of one copy."""


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
        """The folder, made if need be, with what an earlier start left in it: in an object store
        what it saved last. What this machine has of it may be older, or half of something."""
        path = self.path
        if not self.storage.is_local:
            shutil.rmtree(path, ignore_errors=True)
            copy, files = self._saved()
            for name in files:
                data = self.storage.read(self._root, self.key, copy, name)
                if data is not None:
                    target = path / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def save(self) -> None:
        """Send what is in it to the storage, all of it or nothing: whoever is killed meanwhile
        leaves the copy that was saved before. Files that go while they are read are passed over."""
        if self.storage.is_local:
            return
        copy, files = uuid.uuid4().hex[:8], []
        for path in sorted(self.path.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    name = path.relative_to(self.path).as_posix()
                    self.storage.write(path.read_bytes(), self._root, self.key, copy, name)
                    files.append(name)
        saved = json.dumps({"copy": copy, "files": files})
        self.storage.write(saved.encode(), self._root, self.key, SAVED)
        for other in set(self.storage.folders(self._root, self.key)) - {copy}:
            self.storage.delete_folder(self._root, self.key, other)

    def forget(self) -> None:
        """Remove it, here and there."""
        self.storage.delete_folder(self._root, self.key)
        self.leave()

    def leave(self) -> None:
        """Remove what this machine holds of one in an object store."""
        if not self.storage.is_local:
            shutil.rmtree(self.path, ignore_errors=True)

    def _saved(self) -> tuple[str, list[str]]:
        """The copy in the storage that counts, and its files."""
        found = json.loads(self.storage.read(self._root, self.key, SAVED) or b"{}")
        return found.get("copy", ""), found.get("files", [])
