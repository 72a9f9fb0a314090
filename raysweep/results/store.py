"""The results of studies at a URI: rows and curves as Parquet, durable, readable by any tool.

    URI/raysweep.json            what this folder is
    URI/trials/*.parquet         one row a trial: a file each, or merged into part-*.parquet
    URI/curves/*.parquet         loss curves, likewise
    URI/studies/NAME.yaml        the search space of each study, as it was run last
    URI/runs/*.json              when each run was, on what, and how busy its workers were
    URI/checkpoints/KEY/         of running trials only

A row's file is named by its trial key, so that writing a trial again replaces it. `trials/` is an
ordinary Parquet data set: `pandas.read_parquet("URI/trials")` reads it.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import dataset as ds

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.results.schema import (
    ARROW_SCHEMA,
    COLUMNS,
    CURVE_SCHEMA,
    FINISHED,
    SCHEMA_VERSION,
    row_table,
)

MARKER = "raysweep.json"
TRIALS, CURVES, STUDIES, RUNS = "trials", "curves", "studies", "runs"
COMPACT_ABOVE = 64
"""Single files that a folder may hold before they are merged."""
PART_ROWS = 50_000
"""Rows a merged file may hold before a new one is begun."""

_KEY = re.compile(r"^[A-Za-z0-9_-]{1,64}$")


class Results:
    """A results folder. Safe for many writers: each writes files of its own, atomically."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.problems: list[str] = []
        """Files that could not be read, in words; filled by reading."""

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, create: bool = False) -> Results:
        """Open a results folder; with `create`, make one where nothing stands yet.

        Raises UserError where there is none, or where something else stands.
        """
        storage = Storage.at(uri)
        marker = storage.read(MARKER)
        if marker is not None:
            _check_marker(marker, storage.uri)
        elif not create:
            what = "holds no raysweep results" if storage.exists() else "does not exist"
            raise UserError(f"{storage.uri} {what}: check the path, or make it with 'raysweep run'")
        elif storage.exists():
            raise UserError(
                f"{storage.uri} is not empty and holds no raysweep results: name another folder"
            )
        else:
            content = {"format": "raysweep results", "schema_version": SCHEMA_VERSION}
            storage.write(json.dumps(content).encode(), MARKER)
        return cls(storage)

    @property
    def uri(self) -> str:
        return self.storage.uri

    def write(
        self, row: Mapping[str, Any], curve: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Write one trial: the curve first, so that whoever sees the row finds its curve."""
        key = str(row["trial_key"])
        assert _KEY.match(key), key
        if curve is not None and len(curve["step"]):
            columns = {"trial_key": [key] * len(curve["step"]), **curve}
            table = pa.Table.from_pydict(columns, schema=CURVE_SCHEMA)
            self._write_table(table, CURVES, f"{key}.parquet")
        self._write_table(row_table([dict(row)]), TRIALS, f"{key}.parquet")

    def write_many(self, rows: pd.DataFrame) -> int:
        """Write many rows as one file, as imports do. Rows that stand already are not repeated.

        Returns how many rows were new.
        """
        known = set(self.frame()["trial_key"])
        fresh = rows[~rows["trial_key"].isin(known)].drop_duplicates("trial_key")
        if len(fresh):
            table = pa.Table.from_pandas(
                fresh.reindex(columns=list(COLUMNS)), schema=ARROW_SCHEMA, preserve_index=False
            )
            self._write_table(table.replace_schema_metadata(None), TRIALS, _part_name())
        return len(fresh)

    def frame(self, study: str | None = None) -> pd.DataFrame:
        """One row a trial, in order of writing; columns as in `schema.COLUMNS`.

        Where a trial stands more than once (a retry, or a merge that was cut off), a finished row
        counts before any other, then the latest.
        """
        frame = self._read(TRIALS, ARROW_SCHEMA).to_pandas()
        if study is not None:
            frame = frame[frame["study"] == study]
        order = frame.assign(_finished=frame["status"] == FINISHED)
        order = order.sort_values(["_finished", "started_at"], kind="stable", na_position="first")
        kept = order.drop_duplicates("trial_key", keep="last").drop(columns="_finished")
        return kept.sort_values(["started_at", "trial_key"], kind="stable").reset_index(drop=True)

    def find(self, trial_key: str) -> dict[str, Any] | None:
        """The row in a trial's own file, or None; merged rows are not looked for."""
        table = self._try(TRIALS, f"{trial_key}.parquet", ARROW_SCHEMA)
        return table.to_pylist()[0] if table is not None and len(table) else None

    def curves(self, trial_keys: Iterable[str] | None = None) -> pd.DataFrame:
        """Loss curves, `CURVE_SCHEMA`'s columns, of all trials or of some."""
        table = self._read(CURVES, CURVE_SCHEMA)
        frame = table.to_pandas().drop_duplicates(["trial_key", "step"], keep="last")
        if trial_keys is not None:
            frame = frame[frame["trial_key"].isin(set(trial_keys))]
        return frame.sort_values(["trial_key", "step"]).reset_index(drop=True)

    def save_search_space(self, study: str, text: str) -> None:
        """Keep the search space that a study was run with beside its rows."""
        self.storage.write(text.encode(), STUDIES, f"{study}.yaml")

    def search_spaces(self) -> dict[str, str]:
        """Search-space texts by study name."""
        found: dict[str, str] = {}
        for info in sorted(self.storage.list(STUDIES), key=lambda i: i.base_name):
            text = self.storage.read(STUDIES, info.base_name)
            if text is not None and info.base_name.endswith(".yaml"):
                found[info.base_name.removesuffix(".yaml")] = text.decode()
        return found

    def save_run(self, record: Mapping[str, Any]) -> None:
        """Keep what one `raysweep run` did: times, workers, utilisation. Needs `started_at`."""
        name = re.sub(r"[^0-9TZ]", "", str(record["started_at"]))[:20]
        self.storage.write(json.dumps(dict(record), indent=1).encode(), RUNS, f"{name}.json")

    def runs(self) -> list[dict[str, Any]]:
        """Records of all runs, oldest first."""
        names = sorted(i.base_name for i in self.storage.list(RUNS))
        texts = [self.storage.read(RUNS, n) for n in names if n.endswith(".json")]
        return [json.loads(t) for t in texts if t]

    def compact(self, above: int = COMPACT_ABOVE) -> None:
        """Merge single files where there are more than `above`.

        The merged file is in place before the single ones go, so a crash between the two leaves
        rows twice, which reading resolves, and never loses one.
        """
        for folder, schema in ((TRIALS, ARROW_SCHEMA), (CURVES, CURVE_SCHEMA)):
            names = [i.base_name for i in self.storage.list(folder)]
            singles = [n for n in names if n.endswith(".parquet") and not n.startswith("part-")]
            if len(singles) <= above:
                continue
            readable = {n: t for n in singles if (t := self._try(folder, n, schema)) is not None}
            merged = pa.concat_tables(list(readable.values()))
            for start in range(0, max(1, len(merged)), PART_ROWS):
                self._write_table(merged.slice(start, PART_ROWS), folder, _part_name())
            for name in readable:
                self.storage.delete(folder, name)

    def _write_table(self, table: pa.Table, *parts: str) -> None:
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        self.storage.write(buffer.getvalue(), *parts)

    def _read(self, folder: str, schema: pa.Schema) -> pa.Table:
        names = [i.base_name for i in self.storage.list(folder) if i.base_name.endswith(".parquet")]
        self.problems = [p for p in self.problems if not p.startswith(f"{folder}/")]
        if not names:
            return schema.empty_table()
        paths = [self.storage.path(folder, name) for name in names]
        try:  # all at once; a damaged or vanished file is looked for only when there is one
            data = ds.dataset(
                paths, schema=schema, format="parquet", filesystem=self.storage.filesystem
            )
            return data.to_table()
        except (pa.ArrowException, OSError):
            tables = [self._try(folder, name, schema) for name in names]
            return pa.concat_tables([schema.empty_table(), *(t for t in tables if t is not None)])

    def _try(self, folder: str, name: str, schema: pa.Schema) -> pa.Table | None:
        data = self.storage.read(folder, name)
        if data is None:  # merged away meanwhile: its rows stand in the merged file
            return None
        try:
            source = pa.BufferReader(data)
            return ds.dataset(pq.read_table(source)).to_table().select(schema.names).cast(schema)
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            self.problems.append(f"{folder}/{name} is unreadable and was left out: {reason}")
            return None


def _part_name() -> str:
    return f"part-{uuid.uuid4().hex[:16]}.parquet"


def _check_marker(marker: bytes, uri: str) -> None:
    try:
        version = int(json.loads(marker)["schema_version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{uri}/{MARKER} is damaged: restore it, or import into a new folder"
        ) from None
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{uri} was written by a newer raysweep (schema {version}): upgrade raysweep"
        )
