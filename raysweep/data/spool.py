"""The text of a corpus on its way to tokens: spooled to disk once, split by content hash."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from raysweep.data.sources import boundary

_LONG_SHARE = 8
_LARGEST_PIECE, _SMALLEST_PIECE = 64 * 1024, 1024


class DocumentSpool:
    """Documents appended to one file, with their lengths and content hashes in memory.

    A context manager. Memory is 17 bytes a document; the file is as long as the text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._ends = array("q", [0])
        self._digests = array("Q")
        self._sets = array("h")

    def __enter__(self) -> DocumentSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def bytes(self) -> int:
        return self._ends[-1]

    def add(self, text: bytes, *, held_out: int = 0) -> None:
        """Append a document, of training or of the held-out set of a number from 1 on."""
        self._file.write(text)
        self._ends.append(self._ends[-1] + len(text))
        self._digests.append(_digest(text))
        self._sets.append(held_out)

    def split(self, fraction: float, sets: int = 1) -> tuple[Documents, list[Documents]]:
        """Training documents and those of each held-out set, each in the order they came in.

        Training documents of the same content as held-out ones are dropped. A set without documents
        gets those of lowest content hash, until they make up `fraction` of the training bytes:
        equal documents land on one side, and one that stays in the corpus as it grows hardly ever
        changes sides. A document longer than an eighth of the corpus, which would unbalance the
        split, is cut at line ends into pieces first.
        """
        self._file.flush()
        ends = np.frombuffer(self._ends, dtype=np.int64)
        starts, ends = ends[:-1], ends[1:]
        digests = np.frombuffer(self._digests, dtype=np.uint64)
        of_set = np.frombuffer(self._sets, dtype=np.int16)
        held_out = [
            Documents(self._path, starts[of_set == number], ends[of_set == number])
            for number in range(1, sets + 1)
        ]
        train = (of_set == 0) & ~np.isin(digests, digests[of_set > 0])
        starts, ends, digests = starts[train], ends[train], digests[train]
        if all(map(len, held_out)):
            return Documents(self._path, starts, ends), held_out
        total = int((ends - starts).sum())
        if len(ends):
            starts, ends, digests = self._cut_long(starts, ends, digests, fraction, total)
        order = np.argsort(digests, kind="stable")
        filled = np.cumsum((ends - starts)[order])
        last = np.searchsorted(filled, fraction * total)
        share = digests <= digests[order[last]] if len(ends) > 1 else digests < 0
        own = Documents(self._path, starts[share], ends[share])
        return (
            Documents(self._path, starts[~share], ends[~share]),
            [documents if len(documents) else own for documents in held_out],
        )

    def _cut_long(
        self,
        starts: np.ndarray,
        ends: np.ndarray,
        digests: np.ndarray,
        fraction: float,
        total: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        target = fraction * total
        longest = max(target, total / _LONG_SHARE)
        piece = int(min(_LARGEST_PIECE, max(_SMALLEST_PIECE, target / 4)))
        columns: list[tuple[np.ndarray, ...]] = []
        done = 0
        for index in np.flatnonzero(ends - starts > longest):
            columns.append((starts[done:index], ends[done:index], digests[done:index]))
            with self._path.open("rb") as file:
                file.seek(starts[index])
                text = file.read(ends[index] - starts[index])
            cuts = [0]
            while cuts[-1] < len(text):
                window = text[cuts[-1] : cuts[-1] + piece + 1]
                cuts.append(cuts[-1] + boundary(window, piece))
            hashes = [_digest(text[a:b]) for a, b in pairwise(cuts)]
            spans = starts[index] + np.array(cuts)
            columns.append((spans[:-1], spans[1:], np.array(hashes, dtype=np.uint64)))
            done = index + 1
        columns.append((starts[done:], ends[done:], digests[done:]))
        first, last, hashed = (np.concatenate(column) for column in zip(*columns, strict=True))
        return first, last, hashed


class Documents:
    """Some documents of a staging file, read back in order."""

    def __init__(self, path: Path, starts: np.ndarray, ends: np.ndarray) -> None:
        self._path = path
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def bytes(self) -> int:
        return int((self._ends - self._starts).sum())

    def every(self, stride: int) -> Documents:
        return Documents(self._path, self._starts[::stride], self._ends[::stride])

    def chunks(self, size: int) -> Iterator[list[bytes]]:
        """Lists of documents of about `size` bytes together (never an empty list)."""
        chunk: list[bytes] = []
        held = 0
        with self._path.open("rb") as file:
            for start, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
                file.seek(start)
                chunk.append(file.read(end - start))
                held += end - start
                if held >= size:
                    yield chunk
                    chunk, held = [], 0
        if chunk:
            yield chunk


def _digest(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
