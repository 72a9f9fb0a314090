"""Files at a URI, local or in an object store, written so that a reader sees all of one or none."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
from pyarrow import fs

from raysweep.errors import StorageError, UserError

T = TypeVar("T")

ATTEMPTS = 6
"""Tries at a storage call; waits double from 0.1 or 0.2 s, so a fault of 3 s is ridden out."""
PATIENCE_SECONDS = 20.0
"""After which a call that failed is not tried again: clients retry too, some for long."""
STUDY_PATIENCE_SECONDS = 300.0
"""The same within a study: what it has trained is worth more than the wait. Less than the silence
after which a worker counts as hung."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_ARROW_SCHEMES = {"s3", "gs", "gcs", "hdfs"}
"""What PyArrow opens itself; the rest goes through fsspec."""
_ARROW_OPTIONS = {"s3": "allow_delayed_open=true", "gs": "retry_limit_seconds=10"}
"""Small objects in one request instead of three; not a quarter of an hour for one call."""
_REFUSED = re.compile(r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH")
"""What object stores say that trying again does not change."""


@dataclass(frozen=True)
class Storage:
    """A folder at a URI: `path/to`, `s3://bucket/prefix`, `gs://...`, or any fsspec URI."""

    uri: str
    filesystem: fs.FileSystem
    root: str

    @classmethod
    def at(cls, uri: str | os.PathLike[str]) -> Storage:
        """Resolve a URI. Raises UserError for one that names no filesystem."""
        text = os.fspath(uri)
        folder = local_folder(text)
        if folder is not None:
            return cls(str(folder), fs.LocalFileSystem(), str(folder))
        if text.endswith("://"):
            raise UserError(f"{text} names no place: write {text}BUCKET/FOLDER")
        if text.split("://")[0] in _ARROW_SCHEMES:
            filesystem, root = _through_arrow(text)
        else:
            filesystem, root = _through_fsspec(text)
        return cls(text.rstrip("/"), filesystem, root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def read(self, *parts: str) -> bytes | None:
        """Contents of a file, or None where there is none."""

        def attempt() -> bytes | None:
            try:
                with self.filesystem.open_input_file(self.path(*parts)) as stream:
                    return stream.read()
            except (FileNotFoundError, NotADirectoryError):
                return None

        return retry(attempt, f"read {'/'.join(parts)} in {self.uri}")

    def write(self, data: bytes | pa.Buffer, *parts: str) -> None:
        """Put a file in place whole: a reader, or a crash, never meets half of one."""
        path = self.path(*parts)

        def attempt() -> None:
            if self.is_local:
                _write_local(Path(path), data)
            else:  # object stores make an object visible when its upload completes
                with self.filesystem.open_output_stream(path) as stream:
                    stream.write(data)

        retry(attempt, f"write {'/'.join(parts)} in {self.uri}")

    def delete(self, *parts: str) -> None:
        """Remove a file; one that is gone already is no error."""

        def attempt() -> None:
            try:
                self.filesystem.delete_file(self.path(*parts))
            except FileNotFoundError:
                return

        retry(attempt, f"delete {'/'.join(parts)} in {self.uri}")

    def list(self, *parts: str) -> list[fs.FileInfo]:
        """Files right under a folder, hidden ones left out; none where there is no folder."""
        return [i for i in self._infos(*parts) if i.is_file and not i.base_name.startswith(".")]

    def folders(self, *parts: str) -> list[str]:
        """Names of the folders right under a folder."""
        return [i.base_name for i in self._infos(*parts) if i.type is fs.FileType.Directory]

    def delete_folder(self, *parts: str) -> None:
        """Remove a folder and all in it; one that is gone already is no error."""
        # A look is one request of an object store, and what follows five.
        if not self.is_local and not self._infos(*parts):
            return

        def attempt() -> None:
            try:
                self.filesystem.delete_dir(self.path(*parts))
            except FileNotFoundError:
                return

        retry(attempt, f"delete {'/'.join(parts)} in {self.uri}")

    def _infos(self, *parts: str) -> Sequence[fs.FileInfo]:
        """What stands right under a folder."""
        selector = fs.FileSelector(self.path(*parts), allow_not_found=True)
        what = f"list {'/'.join(parts)} in {self.uri}"
        return retry(lambda: self.filesystem.get_file_info(selector), what)

    def exists(self) -> bool:
        """Whether anything but hidden files, such as half-written ones, stands at the root (object
        stores have no empty folders)."""

        def attempt() -> bool:
            info = self.filesystem.get_file_info(self.root)
            if info.type is fs.FileType.File:
                raise UserError(f"{self.uri} is a file: name a folder")
            if info.type is fs.FileType.NotFound:
                return False
            infos = self.filesystem.get_file_info(fs.FileSelector(self.root))
            return any(not info.base_name.startswith(".") for info in infos)

        return retry(attempt, f"look at {self.uri}")


def local_folder(uri: str) -> Path | None:
    """The folder that a path or a `file://` URI names; None for a place elsewhere.

    Raises UserError for a URI of no kind that is known.
    """
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    if not re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+://", uri):
        return Path(uri).expanduser().resolve()
    scheme = uri.split("://")[0]
    if scheme == "memory":
        raise UserError(f"{uri} would be lost with this process: name a folder, s3:// or gs://")
    if scheme not in _ARROW_SCHEMES and scheme not in fsspec.available_protocols():
        raise UserError(f"{uri}: no filesystem for this URI; use a folder, s3:// or gs://")
    return None


_study_runs = False


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Wait longer for a storage that fails, as processes of a study do."""
    global _study_runs
    before, _study_runs = _study_runs, True
    try:
        yield
    finally:
        _study_runs = before


def retry(action: Callable[[], T], what: str) -> T:
    """Run a storage call; passing faults are tried again. Lasting ones become one clear line, as
    UserError, and those that did not pass in time as StorageError."""
    begun = time.monotonic()
    patience = STUDY_PATIENCE_SECONDS if _study_runs else PATIENCE_SECONDS
    for attempt in itertools.count(1):
        try:
            return action()
        except OSError as error:
            if error.errno in _FULL:
                raise UserError(
                    f"cannot {what}: no space left; free some, then run again"
                ) from error
            if error.errno in _LASTING or _REFUSED.search(str(error)):
                raise UserError(f"cannot {what}: {error}") from error
            tried = attempt >= ATTEMPTS and not _study_runs
            if tried or time.monotonic() - begun > patience:
                raise StorageError(f"cannot {what}: {error}") from error
            time.sleep(random.uniform(0.5, 1.0) * min(5.0, 0.1 * 2**attempt))
    raise AssertionError("unreachable")


def _through_arrow(uri: str) -> tuple[fs.FileSystem, str]:
    full = uri
    option = _ARROW_OPTIONS.get(uri.split("://")[0])
    if option is not None and option.split("=")[0] not in uri:
        full += ("&" if "?" in uri else "?") + option
    try:  # it looks up a bucket's region, which can fail as any request can
        return retry(lambda: fs.FileSystem.from_uri(full), f"open {uri}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{uri} is no URI that can be opened: {error}") from None


def _through_fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, root = fsspec.url_to_fs(uri)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"{uri}: no filesystem for this URI ({error}); use a folder, s3:// or gs://"
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root


def _write_local(path: Path, data: bytes | pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
