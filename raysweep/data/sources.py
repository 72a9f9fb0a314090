"""Documents read from text files, JSON lines and Parquet; every one is UTF-8 without NUL bytes."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raysweep.errors import UserError

BLOCK = 16 * 2**20
"""Text files are read in blocks of this many bytes, cut at line ends; each is a document."""
_SNIFF = 8192

Format = Literal["text", "jsonl", "parquet", "tokens"]
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "text": (),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "parquet": (".parquet", ".pq"),
    "tokens": (".bin",),
}
"""Which files of a folder are read; none given means every file. A file named outright is read
whatever its suffix."""


@dataclass
class ReadStats:
    """What was read, and what was left out for which reason."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Files or documents left out, by reason."""

    def keep(self, text: bytes) -> bytes:
        self.documents += 1
        self.bytes += len(text)
        return text

    def as_dict(self) -> dict[str, object]:
        dropped = dict(sorted(self.dropped.items()))
        return {
            "files": self.files,
            "documents": self.documents,
            "bytes": self.bytes,
            "dropped": dropped,
        }


def find_files(paths: Sequence[str], folder: Path, form: Format, key: str) -> dict[Path, bool]:
    """The files that `paths` (of the search-space key `key`) mean, and whether they are named
    outright rather than met in a folder.

    Folders are walked recursively, in sorted order, without hidden files. Raises UserError for a
    path that does not exist or a folder without a fitting file.
    """
    found: dict[Path, bool] = {}
    for name in paths:
        path = (folder / Path(name).expanduser()).resolve()
        if path.is_file():
            found[path] = True
        elif path.is_dir():
            suffixes = _SUFFIXES[form] or ""
            inside = [f for f in walk(path) if str(f).endswith(suffixes) and f.is_file()]
            if not inside:
                wanted = " or ".join(_SUFFIXES[form]) or "visible"
                raise UserError(f"{key}: the folder {path} holds no {wanted} file: change {key}")
            for file in inside:
                found.setdefault(file, False)
        else:
            raise UserError(f"{key}: {path} not found: check {key}")
    return found


def walk(root: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """Files below a folder in sorted order, hidden ones and folders named in `skip` left out."""
    skip = set(skip)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if not d.startswith(".") and d not in skip)
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def read_documents(
    files: Mapping[Path, bool], form: Format, text_column: str, stats: ReadStats
) -> Iterator[bytes]:
    """Documents of the files in order. A file named outright (see find_files) that is no text is
    an error, one met in a folder is left out and counted."""
    for path, named in files.items():
        try:
            if form == "text":
                texts = _read_text(path, named, stats)
            elif form == "jsonl":
                texts = _read_jsonl(path, text_column, stats)
            else:
                texts = _read_parquet(path, text_column, stats)
            stats.files += 1
            for text in texts:
                clean = text.replace(b"\0", b"")
                if clean.strip():
                    yield stats.keep(clean)
                else:
                    stats.dropped["empty"] += 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{path} cannot be read ({reason}): check data.paths") from None


def boundary(text: bytes, limit: int) -> int:
    """Where to cut before `limit`: behind the last line end, else the last space, else between
    two characters (never 0 for a limit of 4 and more)."""
    if limit >= len(text):
        return len(text)
    for mark in (b"\n", b" "):
        cut = text.rfind(mark, 0, limit) + 1
        if cut:
            return cut
    while limit > 0 and text[limit] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        limit -= 1
    return limit


def decode_problem(text: bytes) -> str | None:
    """Why bytes are not text; None for UTF-8 without NUL bytes."""
    if b"\0" in text[:_SNIFF]:
        return "not UTF-8 text"
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return None


def normalise_newlines(text: bytes) -> bytes:
    """Line ends as on Unix, and no byte-order mark."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    return text.replace(b"\r\n", b"\n") if b"\r" in text else text


def _read_text(path: Path, named: bool, stats: ReadStats) -> Iterator[bytes]:
    with path.open("rb") as file:
        carry = b""
        while block := carry + file.read(BLOCK - len(carry)):
            cut = len(block) if len(block) < BLOCK else boundary(block, BLOCK - 1)
            block, carry = block[:cut], block[cut:]
            if problem := decode_problem(block):
                if named:
                    raise UserError(f"{path} is {problem}: convert it, or drop it from data.paths")
                stats.files -= 1
                stats.dropped[problem] += 1
                return
            yield normalise_newlines(block)


def _read_jsonl(path: Path, column: str, stats: ReadStats) -> Iterator[bytes]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{where} is no JSON object: give one object a line")
                if column not in row:
                    raise UserError(_no_column(where, column, row))
                text = row[column]
                if text is None:
                    stats.dropped["null"] += 1
                elif isinstance(text, str):
                    yield text.encode("utf-8", errors="replace")
                else:
                    raise UserError(
                        f"{where}: column {column} holds {type(text).__name__}, not text: "
                        "set data.text_column"
                    )
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or not UTF-8 ({error}): replace it") from None


def _read_parquet(path: Path, column: str, stats: ReadStats) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(_no_column(str(path), column, schema.names))
            kind = schema.field(column).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(
                    f"{path}: column {column} holds {kind}, not text: set data.text_column"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        stats.dropped["null"] += 1
                    else:
                        yield text.encode("utf-8")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no readable Parquet file ({reason}): replace it") from None


def _no_column(where: str, column: str, columns: Iterable[str]) -> str:
    return (
        f"{where} has no column {column} (it has: {', '.join(map(str, columns))}): "
        "set data.text_column"
    )
