"""The results of studies at a URI: rows and curves as Parquet, durable, readable by any tool.

    URI/raysweep.json            what this folder is
    URI/trials/*.parquet         one row a trial: a file each, or merged into part-*.parquet
    URI/curves/*.parquet         loss curves, likewise
    URI/studies/NAME.yaml        the search space of each study, as it was run last
    URI/studies/NAME.ranges.json how far its search widened the ranges of that
    URI/studies/NAME.running.json its trials that are not over, and how it goes
    URI/studies/NAME.retry.json  since when its crashed trials are handed out again, while they are
    URI/runs/*.json              when each run was, on what, and how busy its workers were
    URI/forecast.json            what was forecast of cells before they were trained, if anything
    URI/outcome.json             what became of it
    URI/checkpoints/KEY/         of running trials only

A row's file is named by its trial key and study, so that writing a trial again replaces it, and
studies that run the same trial have a row each. `trials/` is an ordinary Parquet data set:
`pandas.read_parquet("URI/trials")` reads it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from raysweep import allocator
from raysweep.display import InNotebooks
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
from raysweep.results.tables import PART, TableFolder

MARKER = "raysweep.json"
TRIALS, CURVES, STUDIES, RUNS = "trials", "curves", "studies", "runs"
CHECKPOINTS, PENDING = "checkpoints", "pending"
RUNNING = ".running.json"
FORECAST, OUTCOME = "forecast.json", "outcome.json"
COMPACT_ABOVE, COMPACT_ABOVE_REMOTE = 64, 2
"""Files of a kind that a folder may hold before they are merged; of rows in an object store, where
each costs whoever looks two requests."""

_opened: dict[str, Storage] = {}
"""Object stores with results that this process has seen: each trial opens them several times, and
every look at the marker is a request."""
_KEY = re.compile(r"^[A-Za-z0-9_-]{1,64}$")
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")


class Results(InNotebooks):
    """A results folder. Safe for many writers: each writes files of its own, atomically."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        needed = tuple(name for name, c in COLUMNS.items() if c.required)
        self._trials = TableFolder(storage, TRIALS, ARROW_SCHEMA, needed)
        self._curves = TableFolder(storage, CURVES, CURVE_SCHEMA, ("trial_key", "step"))
        self._damaged: dict[str, str] = {}

    @property
    def problems(self) -> list[str]:
        """Files that could not be read, in words; filled by reading."""
        found = (self._trials.problems, self._curves.problems, self._damaged)
        return [problem for each in found for problem in each.values()]

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, create: bool = False) -> Results:
        """Open a results folder; with `create`, make one where nothing stands yet.

        Raises UserError where there is none, or where something else stands.
        """
        if (known := _opened.get(os.fspath(uri))) is not None:
            return cls(known)
        storage = Storage.at(uri)
        marker = storage.read(MARKER)
        if marker is None and create and storage.exists():
            marker = storage.read(MARKER)  # perhaps another process has made it just now
            if marker is None:
                raise UserError(
                    f"{storage.uri} is not empty and holds no raysweep results: name another folder"
                )
        if marker is not None:
            _check_marker(marker, storage.uri)
        elif not create:
            raise UserError(_nothing_at(storage))
        else:
            content = {"format": "raysweep results", "schema_version": SCHEMA_VERSION}
            storage.write(json.dumps(content).encode(), MARKER)
        if not storage.is_local:
            _opened[os.fspath(uri)] = storage
        return cls(storage)

    @property
    def uri(self) -> str:
        return self.storage.uri

    def __len__(self) -> int:
        return len(self.to_pandas())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        frame = self.to_pandas()
        names = ", ".join(dict.fromkeys(frame["study"].astype(str))) or "nothing yet"
        return f"<Results {self.uri}: {len(frame)} trials of {names}>"

    def best(self) -> pd.DataFrame:
        """The finished trial of least loss of each cell: one row a cell, smallest runs first."""
        frame = self.to_pandas()
        done = frame[(frame["status"] == FINISHED) & frame["excluded"].isna()]
        done = done[done["loss"].notna()]
        best = done.loc[done.groupby(["study", "cell"], sort=False)["loss"].idxmin()]
        order = ["params_active_non_embedding", "tokens", "cell"]
        return best.sort_values(order, kind="stable").reset_index(drop=True)

    def write(
        self, row: Mapping[str, Any], curve: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Write one trial: the curve first, so that whoever sees the row finds its curve."""
        key = str(row["trial_key"])
        assert _KEY.match(key), key
        if curve is not None and len(curve["step"]):
            columns = {"trial_key": [key] * len(curve["step"]), **curve}
            table = pa.Table.from_pydict(columns, schema=CURVE_SCHEMA)
            self._curves.write(table, f"{key}.parquet")
        self._trials.write(row_table([dict(row)]), _row_file(key, str(row["study"])))

    def write_many(self, rows: pd.DataFrame, curves: pd.DataFrame | None = None) -> int:
        """Write many rows, and their curves, as one file each, as imports do. Rows that stand
        already are not repeated.

        Returns how many rows were new.
        """
        known = set(self.to_pandas()["trial_key"])
        fresh = rows[~rows["trial_key"].isin(known)].drop_duplicates("trial_key")
        if curves is not None and len(curves):
            own = curves[curves["trial_key"].isin(set(fresh["trial_key"]))]
            self._curves.write(pa.Table.from_pandas(own, schema=CURVE_SCHEMA, preserve_index=False))
        if len(fresh):
            table = pa.Table.from_pandas(
                fresh.reindex(columns=list(COLUMNS)), schema=ARROW_SCHEMA, preserve_index=False
            )
            self._trials.write(table.replace_schema_metadata(None))
        return len(fresh)

    def to_pandas(self, study: str | None = None) -> pd.DataFrame:
        """One row a trial, in order of writing; columns as in `schema.COLUMNS`, and of each named
        validation set `loss.NAME` and `loss_se.NAME`.

        Where a trial of a study stands more than once (a retry, or a merge that was cut off), a
        finished row counts before any other, then the latest.
        """
        frame = self._trials.read().to_pandas()
        if study is not None:
            frame = frame[frame["study"] == study]
        order = frame.assign(_finished=frame["status"] == FINISHED)
        order = order.sort_values(["_finished", "started_at"], kind="stable", na_position="first")
        kept = order.drop_duplicates(["study", "trial_key"], keep="last").drop(columns="_finished")
        kept = kept.sort_values(["started_at", "trial_key"], kind="stable").reset_index(drop=True)
        return kept.join(_named_losses(kept["named_losses"]))

    def find(self, trial_key: str, study: str) -> dict[str, Any] | None:
        """The row in the own file of a study's trial, or None; merged rows are not looked for."""
        table = self._trials.find(_row_file(trial_key, study))
        return table.to_pylist()[0] if table is not None and len(table) else None

    def curves(self, trial_keys: Iterable[str] | None = None) -> pd.DataFrame:
        """Loss curves, `CURVE_SCHEMA`'s columns, of all trials or of some."""
        frame = self._curves.read().to_pandas().drop_duplicates(["trial_key", "step"], keep="last")
        if trial_keys is not None:
            frame = frame[frame["trial_key"].isin(set(trial_keys))]
        return frame.sort_values(["trial_key", "step"]).reset_index(drop=True)

    def save_search_space(self, study: str, text: str) -> None:
        """Keep the search space that a study was run with beside its rows."""
        self.storage.write(text.encode(), STUDIES, f"{study}.yaml")

    def search_spaces(self) -> dict[str, str]:
        """Search-space texts by study name."""
        return {study: text for study, (text, _) in self.studies().items()}

    def studies(self, *, running: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        """By study, its search space as text, and with `running` what `save_running` kept."""
        texts = self._texts(STUDIES, ".yaml", *([RUNNING] if running else []))
        return {
            (study := name.removesuffix(".yaml")): (text, _plain(texts.get(f"{study}{RUNNING}")))
            for name, text in texts.items()
            if name.endswith(".yaml")
        }

    def save_ranges(self, study: str, ranges: Mapping[str, Any]) -> None:
        """Keep how far a study has widened its ranges; any plain values."""
        self.storage.write(json.dumps(dict(ranges)).encode(), STUDIES, f"{study}.ranges.json")

    def ranges(self, study: str) -> dict[str, Any]:
        """What `save_ranges` kept; empty where there is nothing, or nothing readable."""
        return _plain(self.storage.read(STUDIES, f"{study}.ranges.json"))

    def save_running(self, study: str, record: Mapping[str, Any]) -> None:
        """Keep which trials of a study are not over (`trials`), and how its run goes; any plain
        values."""
        self.storage.write(json.dumps(dict(record)).encode(), STUDIES, f"{study}{RUNNING}")

    def running(self, study: str) -> dict[str, Any]:
        """What `save_running` kept; empty where there is nothing, or nothing readable."""
        return _plain(self.storage.read(STUDIES, f"{study}{RUNNING}"))

    def save_retry(self, study: str, since: datetime | None) -> None:
        """Keep since when crashed trials of a study are handed out again; None: no longer."""
        name = f"{study}.retry.json"
        if since is None:
            self.storage.delete(STUDIES, name)
        else:
            kept = {"since": since.isoformat()}
            self.storage.write(json.dumps(kept).encode(), STUDIES, name)

    def retry(self, study: str) -> datetime | None:
        """What `save_retry` kept; None where there is nothing, or nothing readable."""
        kept = _plain(self.storage.read(STUDIES, f"{study}.retry.json"))
        try:
            return datetime.fromisoformat(kept["since"])
        except (KeyError, TypeError, ValueError):
            return None

    def save_forecast(
        self, forecast: Mapping[str, Any], outcome: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what was forecast of cells, and what became of it: plain JSON values, as
        `raysweep.scaling.forecast` makes them."""
        for record, name in ((forecast, FORECAST), (outcome, OUTCOME)):
            if record is not None:
                text = json.dumps(dict(record), indent=1, allow_nan=False) + "\n"
                self.storage.write(text.encode(), name)

    def forecast(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_forecast` kept; empty where there is nothing, or nothing readable."""
        return _plain(self.storage.read(FORECAST)), _plain(self.storage.read(OUTCOME))

    def save_run(self, record: Mapping[str, Any]) -> None:
        """Keep what one `raysweep run` did: times, workers, utilisation. Needs `started_at`."""
        name = re.sub(r"[^0-9TZ]", "", str(record["started_at"]))[:20]
        self.storage.write(json.dumps(dict(record), indent=1).encode(), RUNS, f"{name}.json")

    def runs(self) -> list[dict[str, Any]]:
        """Records of all runs, oldest first."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name, text in self._texts(RUNS, ".json").items():
            try:
                content = json.loads(text)
                for record in content if isinstance(content, list) else [content]:
                    found[str(record["started_at"]), str(record.get("study"))] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._damaged[name] = f"{RUNS}/{name} is unreadable and was left out"
        return [found[key] for key in sorted(found)]

    def compact(
        self, above: int | None = None, kept: Callable[[], Collection[str]] = tuple
    ) -> None:
        """Merge small files where there are more than `above`, or too many; but for those of trials
        that may be started again, and look for a row of their own: `kept` gives their keys.

        The merged file is in place before the small ones go, so a crash between the two leaves
        rows twice, which reading resolves, and never loses one.
        """
        self.compact_rows(above, kept)
        above = COMPACT_ABOVE if above is None else above
        self._curves.compact(above, kept)
        names = [n for i in self.storage.list(RUNS) if (n := i.base_name).endswith(".json")]
        if len(names) > above:
            records = self.runs()
            merged = json.dumps(records, indent=1).encode()
            self.storage.write(merged, RUNS, f"{PART}{uuid.uuid4().hex[:16]}.json")
            for name in names:
                if name not in self._damaged:
                    self.storage.delete(RUNS, name)
        # Long runs do this often, and what reading takes would never be used again.
        pa.default_memory_pool().release_unused()
        allocator.give_back_freed()

    def compact_rows(
        self, above: int | None = None, kept: Callable[[], Collection[str]] = tuple
    ) -> None:
        """The same of rows alone."""
        usual = COMPACT_ABOVE if self.storage.is_local else COMPACT_ABOVE_REMOTE
        self._trials.compact(usual if above is None else above, kept)

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints that no trial will use: of trials that are in flight in no study
        and have not crashed, as crashed ones are tried again. (One that was ended from outside, as
        by early stopping, leaves its own behind.)"""
        kept = self.storage.folders(CHECKPOINTS)
        if not kept:
            return
        names = [info.base_name for info in self.storage.list(STUDIES)]
        studies = [name.removesuffix(RUNNING) for name in names if name.endswith(RUNNING)]
        in_flight = {str(key) for study in studies for key in keys_in_flight(self.running(study))}
        asked = [info.base_name for info in self.storage.list(PENDING)]  # and run elsewhere
        in_flight |= {key for key in kept if any(name.endswith(f"-{key}.json") for name in asked)}
        if unknown := set(kept) - in_flight:
            rows = self.to_pandas()
            unknown -= set(rows.loc[rows["status"] == "crashed", "trial_key"])
        for name in sorted(unknown):
            self.storage.delete_folder(CHECKPOINTS, name)

    def _texts(self, folder: str, *suffixes: str) -> dict[str, str]:
        """Text files of a folder by name, sorted; damaged ones become problems."""
        found: dict[str, str] = {}
        for name in sorted(i.base_name for i in self.storage.list(folder)):
            if not name.endswith(suffixes):
                continue
            data = self.storage.read(folder, name)
            try:
                if data is not None:  # else merged away meanwhile
                    found[name] = data.decode()
            except UnicodeDecodeError:
                self._damaged[name] = f"{folder}/{name} is unreadable and was left out"
        return found


def _plain(text: str | bytes | None) -> dict[str, Any]:
    """A JSON object; empty where there is none that is readable: what it held is found anew."""
    try:
        kept = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keys_in_flight(running: Mapping[str, Any]) -> list[str]:
    """Keys of the trials in a record of `save_running`."""
    trials = running.get("trials")
    found = trials if isinstance(trials, list) else []
    return [
        str(trial["trial_key"])
        for trial in found
        if isinstance(trial, dict) and "trial_key" in trial
    ]


def _named_losses(texts: pd.Series) -> pd.DataFrame:
    """Losses on named validation sets and their standard errors, a column each."""
    if not texts.notna().any():
        return pd.DataFrame(index=texts.index)
    found = [
        {
            f"{column}.{name}": value
            for name, values in (json.loads(text) if isinstance(text, str) else {}).items()
            for column, value in zip(("loss", "loss_se"), values, strict=True)
        }
        for text in texts
    ]
    return pd.DataFrame(found, index=texts.index)


def _nothing_at(storage: Storage) -> str:
    """What to say of a place without results: what stands there, or what is near."""
    if not storage.is_local:
        what = "holds no raysweep results" if storage.exists() else "does not exist"
        return f"{storage.uri} {what}: check the path, or make it with 'raysweep run'"
    path = Path(storage.uri)
    shown = _as_typed(path)
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            return (
                f"{shown} is a search-space file, no results folder: 'raysweep run {shown}' makes "
                f"its results, in results/{path.stem} unless told"
            )
        if path.suffix in (".csv", ".parquet", ".jsonl"):
            return f"{shown} is a file: 'raysweep import csv {shown} --results FOLDER' reads it"
        return f"{shown} is a file: name a results folder"
    found = _results_in(path) if path.exists() else {}
    names = list(found)
    if not path.exists():
        for folder in (path.parent, Path("results")):
            found |= _results_in(folder)
        names = difflib.get_close_matches(path.name, found, n=1)
    hint = "check the path, or make it with 'raysweep run'"
    if names:
        hint = f"did you mean {_as_typed(found[names[0]])}?"
    what = "holds no raysweep results" if path.exists() else "does not exist"
    return f"{shown} {what}: {hint}"


def _results_in(folder: Path) -> dict[str, Path]:
    """Results folders right in a folder, or in a folder `results` of those in it, by name."""
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir())
    except OSError:
        return {}
    found = {p.name: p / "results" for p in inside if (p / "results" / MARKER).exists()}
    return found | {p.name: p for p in inside if (p / MARKER).exists()}


def _as_typed(path: Path) -> Path:
    """A path from here where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def _row_file(trial_key: str, study: str) -> str:
    return f"{trial_key}.{_UNFIT.sub('_', study)[:64]}.parquet"


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
