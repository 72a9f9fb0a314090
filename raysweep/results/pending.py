"""Trials that were handed out to be trained elsewhere: kept in the results until they are told.

    URI/pending/ID.json     one trial: its columns, when it was asked for, when it expires

A trial is told by writing its row first and removing its file then, so that whoever reads the files
before the rows finds it in one of the two. One that has expired counts as given up, but can be told
all the same; its row is named by its key, so that telling twice makes one row.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.results.schema import COLUMNS, FINISHED, is_loss, make_row
from raysweep.results.store import PENDING, Results

MEASURED = (
    *("loss_se", "train_loss", "bits_per_byte", "noise_scale_tokens", "expert_load_entropy"),
    *("expert_load_max_over_mean", "router_confidence", "seconds_train", "peak_memory_bytes"),
    *("tokens_per_second", "world_size", "device"),
)
"""Columns that may be told with a loss; other names are kept as metrics."""
Status = Literal["finished", "diverged", "out_of_memory", "crashed"]
LONGEST = timedelta(days=3650)
"""What a trial may be given until it expires."""


@dataclass(frozen=True)
class Pending:
    """A trial that was handed out."""

    id: str
    """`STUDY-KEY`."""
    values: dict[str, Any]
    """What the trainer is told: hyperparameters and settings, by name."""
    columns: dict[str, Any]
    """Columns of its row that are known already."""
    asked_at: str
    expires_at: str
    """ISO 8601, UTC, by the asker's clock."""

    @property
    def expired(self) -> bool:
        return datetime.fromisoformat(self.expires_at) < datetime.now(UTC)


def as_lifetime(expires: timedelta | float) -> timedelta:
    """How long a trial may take, of seconds or a timedelta. Raises UserError where it is no time,
    or longer than `LONGEST`."""
    seconds = expires.total_seconds() if isinstance(expires, timedelta) else expires
    if not 0 <= seconds <= LONGEST.total_seconds():
        raise UserError(f"expires {seconds:g} s: it must be from 0 s to {LONGEST.days} days")
    return timedelta(seconds=seconds)


def write_pending(
    storage: Storage, columns: Mapping[str, Any], values: Mapping[str, Any], lifetime: timedelta
) -> Pending:
    """Note a trial as handed out."""
    now = datetime.now(UTC)
    found = Pending(
        id=f"{columns['study']}-{columns['trial_key']}",
        values=dict(values),
        columns=dict(columns),
        asked_at=now.isoformat(),
        expires_at=(now + lifetime).isoformat(),
    )
    storage.write(json.dumps(asdict(found)).encode(), PENDING, f"{found.id}.json")
    return found


def read_pending(storage: Storage, study: str | None = None) -> list[Pending]:
    """The trials of a study, or of all, that were handed out and not told, expired ones included.
    Read them before the rows: a trial told in between is then in both, and never in neither."""
    found = []
    for info in storage.list(PENDING):
        one = _read(storage, info.base_name)
        if one is not None and study in (None, one.columns["study"]):
            found.append(one)
    return found


def tell(
    trial: str,
    *,
    results_uri: str | None = None,
    loss: float | None = None,
    status: Status = FINISHED,
    reason: str | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """Write the row of a trial that was handed out, by its id, and return it.

    Args:
        results_uri: where it was asked for; by default `results/STUDY`.
        loss: the final validation loss, nats a token; one that is not finite is diverged.
        status: how it ended; only `finished` has a loss.
        measured: further columns (`MEASURED`), or numbers of any other name. Numbers that are not
            finite are left out.

    Raises:
        UserError: no such trial was handed out there, the loss is missing or not positive, or a
            value is not of its column's kind.
    """
    study, _, _ = trial.rpartition("-")
    if not study:
        raise UserError(f"{trial} is no trial's id: it is what 'raysweep ask' printed as id")
    uri = results_uri or str(Path("results") / study)
    results = Results.open(uri)
    found = _read(results.storage, f"{trial}.json")
    if found is None:
        raise UserError(
            f"no trial {trial} was handed out in {uri}, or it was told already: name the results "
            "with --results"
        )
    if status not in (known := get_args(Status)):
        raise UserError(f"status {status!r} of trial {trial} is none of {', '.join(known)}")
    if status == FINISHED and loss is None:
        raise UserError(f"trial {trial} needs a loss, or say that it diverged or failed")
    loss = None if loss is None else float(_number("loss", loss))
    if loss is not None and not math.isfinite(loss):
        status, reason = "diverged", reason or "non-finite final loss"
    if status == FINISHED and not is_loss(loss):
        raise UserError(f"loss {loss:g} of trial {trial}: it must be positive, in nats a token")
    columns, asked = found.columns, datetime.fromisoformat(found.asked_at)
    whole = status == FINISHED
    seen = columns["steps"] * columns["batch_tokens"] if whole else None
    kept = {name: _value(name, value) for name, value in measured.items()}
    kept = {name: value for name, value in kept.items() if value is not None}
    more = {name: value for name, value in kept.items() if name not in MEASURED}
    row = make_row(
        **columns,
        **{name: value for name, value in kept.items() if name in MEASURED},
        status=status,
        reason=reason,
        loss=loss if whole else None,
        step=columns["steps"] if whole else None,
        tokens_seen=seen,
        tokens_trained=seen,
        flops=seen and columns["flops_per_token"] * seen,
        flops_6nd=seen and 6.0 * columns["params_active_non_embedding"] * seen,
        metrics=json.dumps(more) if more else None,
        started_at=asked,
        seconds_wall=(datetime.now(UTC) - asked).total_seconds(),
    )
    results.write(row)
    results.storage.delete(PENDING, f"{trial}.json")
    return row


def _value(name: str, given: Any) -> Any:
    """What was measured as its column has it, or as JSON has it where it is no column; None for a
    number that is not finite. Raises UserError."""
    kind = str(COLUMNS[name].type) if name in MEASURED else None
    if kind == "string" and not isinstance(given, str | None):
        raise UserError(f"{name} {given}: it is a text, not a number")
    if given is None or kind == "string" or (kind is None and isinstance(given, str | bool)):
        return given
    value = _number(name, given)
    if not math.isfinite(value):
        return None
    if kind is None:
        return value
    return round(value) if kind == "int64" else float(value)


def _number(name: str, given: Any) -> float:
    """Any library's number as Python's, whole ones as int. Raises UserError."""
    try:
        return int(given) if isinstance(given, numbers.Integral) else float(given)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} {given!r} is no number: tell one") from None


def _read(storage: Storage, file: str) -> Pending | None:
    """A trial's file; None where it is not there, or not readable (another's half-made file)."""
    data = storage.read(PENDING, file) if file.endswith(".json") else None
    try:
        found = Pending(**json.loads(data)) if data else None
    except (ValueError, TypeError):
        return None
    known = found is not None and found.columns.keys() <= COLUMNS.keys()
    return found if known else None
