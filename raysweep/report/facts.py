"""What the page says apart from the fits: runs, their cost, failures, and their provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from raysweep.results.columns import record_of
from raysweep.results.schema import COLUMNS, FINISHED


def studies(frame: pd.DataFrame, spaces: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each study with what its search space says of it; one that cannot be read says nothing."""
    found = []
    for name in dict.fromkeys([*spaces, *frame["study"].dropna().astype(str)]):
        try:
            space = yaml.safe_load(spaces[name]) if name in spaces else {}
        except yaml.YAMLError:
            space = {}
        space = space if isinstance(space, dict) else {}
        description = str(space.get("description") or "")
        text = spaces.get(name, "")
        found.append({"name": name, "space": space, "description": description, "text": text})
    return found


def totals(frame: pd.DataFrame) -> dict[str, float]:
    """Numbers of trials by what became of them, and what they cost."""
    status = frame["status"].astype(str)
    workers = pd.to_numeric(frame["world_size"], errors="coerce").fillna(1)
    seconds = pd.to_numeric(frame["seconds_train"], errors="coerce")
    # A WSD branch was lent the tokens that the row of a longer horizon counts.
    seen = pd.to_numeric(frame["tokens_seen"], errors="coerce")
    trained = pd.to_numeric(frame["tokens_trained"], errors="coerce").fillna(seen)
    flops = pd.to_numeric(frame["flops"], errors="coerce") * (trained / seen).fillna(1.0)
    return {
        "rows": len(frame),
        "failed": int((status != FINISHED).sum()),
        "excluded": int(((status == FINISHED) & frame["excluded"].notna()).sum()),
        "worker_hours": float((seconds * workers).sum() / 3600),
        "flops": float(flops.sum()),
    }


def failures(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows that no fit sees, by why, where, and how many; most frequent first."""
    rows = frame.assign(
        why=frame["excluded"].astype(object).where(frame["excluded"].notna(), frame["reason"]),
        what=frame["status"].astype(object).where(frame["status"] != FINISHED, "left out"),
    )
    rows = rows[(rows["status"] != FINISHED) | rows["excluded"].notna()]
    grouped = rows.assign(why=rows["why"].fillna("no reason recorded")).groupby(
        ["what", "why"], sort=False
    )
    found = []
    for (what, why), part in grouped:
        cells = sorted(set(part["cell"].astype(str)))
        rate = pd.to_numeric(part["learning_rate"], errors="coerce").dropna()
        found.append(
            {
                "what": what,
                "why": why,
                "n": len(part),
                "cells": cells,
                "low": float(rate.min()) if len(rate) else None,
                "high": float(rate.max()) if len(rate) else None,
            }
        )
    return sorted(found, key=lambda f: -f["n"])


def runs_table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each run with its utilisation; records that lack a number show none."""
    table = []
    for run in runs:
        available = _number(run.get("worker_seconds_available"))
        training = _number(run.get("worker_seconds_training"))
        seconds = _number(run.get("seconds"))
        table.append(
            {
                "study": str(run.get("study", "")),
                "started_at": str(run.get("started_at", ""))[:16].replace("T", " "),
                "seconds": seconds,
                "workers": _number(run.get("workers")),
                "trials": _number(run.get("trials")),
                "cpus": _number(run.get("cpus")),
                "gpus": _number(run.get("gpus")),
                "strategy": str(run.get("strategy", "")),
                "available": available,
                "training": training,
                "utilisation": training / available if available and training is not None else None,
            }
        )
    return table


def utilisation(table: Sequence[Mapping[str, Any]]) -> float | None:
    """Worker-seconds inside the training loop over those available, of all runs together."""
    known = [r for r in table if r["utilisation"] is not None]
    available = sum(r["available"] for r in known)
    return sum(r["training"] for r in known) / available if available else None


def provenance(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of everything that tells where the numbers come from."""
    found = [
        ("Source of the rows", _values(frame, "source")),
        ("Hardware", _values(frame, "device")),
        ("Data (hash of the token shards)", _values(frame, "data_hash")),
        ("Revision of raysweep (+ is modified)", _values(frame, "git_revision")),
        ("Libraries", _versions(frame, runs)),
        ("Vocabulary", _values(frame, "vocab_size")),
        ("Sequence length", _values(frame, "sequence_length")),
        ("Training recipe", "; ".join(_recipes(frame))),
        ("Seeds", _values(frame, "seed")),
        ("Search strategy", _values(frame, "strategy")),
        ("Schema version of the rows", _values(frame, "schema_version")),
    ]
    started = pd.to_datetime(frame["started_at"], utc=True, errors="coerce").dropna()
    if len(started):
        first, last = started.min(), started.max()
        found.append(("Trials started (UTC)", f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}"))
    return [(what, value) for what, value in found if value]


def _values(frame: pd.DataFrame, column: str, most: int = 4) -> str:
    """The distinct values of a column, most frequent first."""
    assert column in COLUMNS, column
    values = frame[column].dropna()
    if not len(values):
        return ""
    counts = values.astype(str).value_counts()
    listed = [str(v).removesuffix(".0") for v in counts.index[:most]]
    more = f" and {len(counts) - most} more" if len(counts) > most else ""
    return ", ".join(listed) + more


def _versions(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]]) -> str:
    records: list[Any] = [record_of(text) for text in frame["versions"].dropna().unique()]
    records += [r.get("versions") for r in runs]
    merged: dict[str, list[str]] = {}
    for record in records:
        for name, version in record.items() if isinstance(record, dict) else ():
            known = merged.setdefault(str(name), [])
            if str(version) not in known:
                known.append(str(version))
    return ", ".join(f"{name} {' / '.join(v)}" for name, v in sorted(merged.items()))


def _recipes(frame: pd.DataFrame) -> list[str]:
    records = [record_of(text) for text in frame["recipe"].dropna().unique()[:3]]
    return [", ".join(f"{k} {v}" for k, v in r.items() if v is not None) for r in records if r]


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if good else None
