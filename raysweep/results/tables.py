"""A folder of Parquet files that is one table: reading around damage, merging small files."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import dataset as ds
from pyarrow import fs

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage

PART = "part-"
"""Beginning of the names of merged files; a single file begins with its trial key."""
PART_ROWS = 50_000
"""Rows a merged file may hold before a new one is begun."""
SMALL_BYTES = 1 << 20
"""A merged file below this takes up the next single ones: some thousand rows."""
_STALE_SECONDS = 3600.0
"""Age of a half-written file that nobody can be writing any more."""
_THREADS = 8
_READS = 5
"""Times that a folder is read anew because files were merged under the reader."""

_log = logging.getLogger("raysweep")


class _VanishedError(Exception):
    """A file was merged away between listing and reading."""


@dataclass
class TableFolder:
    """The Parquet files in one folder of a storage, all of one schema."""

    storage: Storage
    name: str
    schema: pa.Schema
    required: tuple[str, ...]
    """Columns without a null; others may be missing, as in files of an older version."""
    problems: dict[str, str] = field(default_factory=dict)
    """Files that could not be read, in words; filled by reading."""

    def write(self, table: pa.Table, file: str | None = None) -> None:
        """Write a file whole, replacing one of that name; without a name as a merged file."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        file = file or f"{PART}{uuid.uuid4().hex[:16]}.parquet"
        self.storage.write(buffer.getvalue(), self.name, file)

    def read(self) -> pa.Table:
        """All rows of all readable files."""
        for _ in range(_READS):
            self.problems.clear()
            names = [i.base_name for i in self._list()]
            try:
                if self.storage.is_local:  # from an object store: three requests a file, not two
                    return self._read_at_once(names)
            except (pa.ArrowException, OSError, ValueError):
                pass  # a damaged or vanished file is looked for only when there is one
            try:
                tables = self._each(names)
            except _VanishedError:
                continue
            return pa.concat_tables([self.schema.empty_table(), *tables.values()])
        raise UserError(f"{self.storage.uri}/{self.name} changes all the time: try again")

    def find(self, file: str) -> pa.Table | None:
        """The rows of one file; None where it is not there or not readable."""
        try:
            return self._read_file(file)
        except _VanishedError:
            return None

    def compact(self, above: int, kept: Callable[[], Collection[str]] = tuple) -> None:
        """Merge single files where there are more than `above`, together with merged ones that are
        small; else merged ones where there are more.

        Of trials whose keys are `kept` the single files stay: that is asked after a look at the
        files. A merged file is in place before those it holds go, so that a crash at any point
        leaves rows twice at worst, which reading must resolve.
        """
        infos = sorted(self._list(), key=lambda i: (i.mtime_ns or 0, i.base_name))
        keys = set(kept())
        singles = [
            i
            for i in infos
            if not i.base_name.startswith(PART) and i.base_name.split(".")[0] not in keys
        ]
        parts = [i for i in infos if i.base_name.startswith(PART)]
        small = [i for i in parts if i.size < SMALL_BYTES]
        if len(singles) > above:
            self._merge([*small, *singles], None)
        elif len(parts) > above:
            self._merge(parts, PART_ROWS // 2)
        self._sweep()

    def _merge(self, infos: list[fs.FileInfo], largest: int | None) -> None:
        try:
            tables = self._each([i.base_name for i in infos])
        except _VanishedError:
            return  # somebody else merges
        if largest is not None:
            tables = {name: table for name, table in tables.items() if len(table) < largest}
        if len(tables) < 2 and all(name.startswith(PART) for name in tables):
            return
        merged = pa.concat_tables(tables.values())
        for start in range(0, max(1, len(merged)), PART_ROWS):
            self.write(merged.slice(start, PART_ROWS))
        # One that was written anew meanwhile, by a worker nobody waits for any more, must stay.
        now = {i.base_name: (i.size, i.mtime_ns) for i in self._list()}
        merged_away = [
            i.base_name
            for i in infos
            if i.base_name in tables and now.get(i.base_name) == (i.size, i.mtime_ns)
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: self.storage.delete(self.name, name), merged_away))

    def _list(self) -> list[fs.FileInfo]:
        return [i for i in self.storage.list(self.name) if i.base_name.endswith(".parquet")]

    def _read_at_once(self, names: list[str]) -> pa.Table:
        if not names:
            return self.schema.empty_table()
        paths = [self.storage.path(self.name, name) for name in names]
        data = ds.dataset(
            paths, schema=self.schema, format="parquet", filesystem=self.storage.filesystem
        )
        return self._checked(data.to_table())

    def _each(self, names: list[str]) -> dict[str, pa.Table]:
        """Readable files by name. Raises _VanishedError."""
        with ThreadPoolExecutor(_THREADS) as pool:
            tables = dict(zip(names, pool.map(self._read_file, names), strict=True))
        return {name: table for name, table in tables.items() if table is not None}

    def _read_file(self, file: str) -> pa.Table | None:
        data = self.storage.read(self.name, file)
        if data is None:
            raise _VanishedError(file)
        try:
            table = pq.read_table(pa.BufferReader(data))
            for column in self.schema:
                if column.name not in table.column_names:
                    table = table.append_column(column, pa.nulls(len(table), column.type))
            return self._checked(table.select(self.schema.names).cast(self.schema))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            self.problems[file] = (
                f"{self.name}/{file} is unreadable and was left out: {lines[0][:120]}"
            )
            return None

    def _checked(self, table: pa.Table) -> pa.Table:
        for name in self.required:
            if table[name].null_count:
                raise ValueError(f"no {name} in some rows")
        return table

    def _sweep(self) -> None:
        """Drop what writers left half-written that were killed."""
        if not self.storage.is_local:
            return
        for path in Path(self.storage.path(self.name)).glob(".*.parquet.????????"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except OSError as error:
                _log.debug("%s: %s", path, error)
