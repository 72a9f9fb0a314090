"""How far a study is, read from its results: from any machine that reaches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import yaml

from raysweep.results import Results
from raysweep.results.pending import read_pending
from raysweep.results.schema import FINISHED
from raysweep.study import Study
from raysweep.text import NOTHING, duration, written


@dataclass(frozen=True)
class CellProgress:
    """One cell of one study."""

    study: str
    cell: str
    statuses: dict[str, int]
    """Rows by status."""
    wanted: int | None
    """Trials that the search space gives a cell; None where it is not among the results."""
    best_loss: float | None
    last: str | None
    """When the latest of its trials started, UTC."""
    running: int | None = None
    """Trials that run now: by the driver's last word, and those that `ask` has handed out; None
    where no driver is at work and none is out."""
    gpu_hours: float = 0.0
    """Of its rows."""
    mfu: float | None = None
    """Model FLOPs utilisation of its rows, 0 to 1, by GPU-hours; None where it is not known."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def progress(uri: str) -> list[CellProgress]:
    """Every cell of the studies at a results URI, planned ones without rows included.

    Raises UserError where there are no results.
    """
    return status(uri)[0]


def status(uri: str) -> tuple[list[CellProgress], dict[str, dict[str, Any]]]:
    """Every cell as `progress` gives them; and totals by study: `gpu_hours`, `cost` and `mfu` of
    its rows, and where a driver has written how its run goes (`raysweep.search.overview`), its last
    word, `at` and `seconds_left` among it, and the number of trials in flight, `trials`.

    Raises UserError where there are no results.
    """
    results = Results.open(uri)
    frame = results.to_pandas()
    planned: dict[tuple[str, str], int] = {}
    goes: dict[str, dict[str, Any]] = {}
    for name, (text, record) in results.studies(running=True).items():
        study = _plan(text)
        price = study.space.price_per_gpu_hour if study is not None else None
        goes[name] = _spent(frame[frame["study"] == name], price)
        now, trials = record.get("now"), record.get("trials")
        if isinstance(now, dict) and isinstance(trials, list):
            goes[name] |= {**now, "trials": len(trials)}
        if study is not None:
            planned |= {(name, c.name): study.space.search.trials_per_cell for c in study.cells}
    keys = frame["study"], frame["cell"]
    rows = {(str(s), str(c)): group for (s, c), group in frame.groupby([*keys], dropna=False)}
    names = [*planned, *(key for key in rows if key not in planned)]
    running = Counter(_running_cells(goes))
    out = (p.columns for p in read_pending(results.storage) if not p.expired)
    running.update((columns["study"], columns["cell"]) for columns in out)
    cells = [
        replace(_cell(*key, rows.get(key, frame[:0]), planned.get(key)), running=running.get(key))
        for key in names
    ]
    return cells, goes


def _running_cells(goes: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """Trials that run now by study and cell, of studies whose driver is at work."""
    return {
        (study, cell): int(each.get("running", 0))
        for study, now in goes.items()
        if not now.get("ended")
        for cell, each in now.get("cells", {}).items()
    }


def in_words(study: str, now: Mapping[str, Any]) -> str:
    """A line on how a study goes."""
    words = []
    if "at" not in now:
        pass
    elif now.get("ended"):
        left = now.get("trials", 0)
        words = [f"{left} trials in flight wait for the next run"] if left else ["no driver"]
    else:
        words = [f"{now.get('trials', 0)} running"]
        if now.get("seconds_left") is not None:
            words.append(f"about {duration(now['seconds_left'])} left")
        if now.get("gpu_use") is not None:
            words.append(f"{now['gpu_use']:.0%} of the GPUs in use")
    if now.get("gpu_hours"):
        words.append(f"{_cost(now, '')} so far")
        if "at" in now and not now.get("ended"):
            words.append(f"{_cost(now, '_to_come')} to come")
    if now.get("mfu") is not None:
        words.append(f"MFU {now['mfu']:.0%}")
    return f"{study}: {', '.join(words)}" + (f" (at {now['at']})" if "at" in now else "")


def _spent(rows: pd.DataFrame, price: float | None) -> dict[str, Any]:
    """GPU-hours, cost and MFU of rows."""
    hours = rows["gpu_hours"].fillna(0.0)
    known = rows["mfu"].notna() & (hours > 0)
    used = float(hours[known].sum())
    return {
        "gpu_hours": float(hours.sum()),
        "cost": None if price is None else price * float(hours.sum()),
        "mfu": float((hours * rows["mfu"])[known].sum()) / used if used else None,
    }


def _cost(now: Mapping[str, Any], which: str) -> str:
    text = f"{now[f'gpu_hours{which}']:.4g} GPU-hours"
    cost = now.get(f"cost{which}")
    return text if cost is None else f"{text} for {cost:,.2f}"


def render(cells: list[CellProgress], goes: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """A plain table, and lines of totals for each study; fit for log files. Both as of `status`."""
    header = ("cell", "running", "done", "finished", "other", "best loss", "last started (UTC)")
    measured = any(cell.mfu is not None for cell in cells)
    table: list[tuple[str, ...]] = [(*header, *(["MFU"] if measured else []))]
    for cell in cells:
        done = sum(cell.statuses.values())
        others = {s: n for s, n in sorted(cell.statuses.items()) if s != FINISHED}
        table.append(
            (
                cell.cell,
                str(cell.running or NOTHING),
                f"{done}/{cell.wanted}" if cell.wanted is not None else str(done),
                str(cell.statuses.get(FINISHED, 0)),
                ", ".join(f"{n} {s}" for s, n in others.items()) or NOTHING,
                written(cell.best_loss, "loss"),
                cell.last or NOTHING,
                *([NOTHING if cell.mfu is None else f"{cell.mfu:.0%}"] if measured else []),
            )
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)).rstrip() for r in table]
    for study in dict.fromkeys(cell.study for cell in cells):
        own = [cell for cell in cells if cell.study == study]
        done = sum(sum(cell.statuses.values()) for cell in own)
        complete = sum(c.wanted is not None and sum(c.statuses.values()) >= c.wanted for c in own)
        lines.append(f"{study}: {complete} of {len(own)} cells complete, {done} trials concluded")
        if goes and study in goes and ("at" in goes[study] or goes[study]["gpu_hours"]):
            lines.append(in_words(study, goes[study]))
    return "\n".join(lines)


def _plan(text: str) -> Study | None:
    """The study that a saved search space describes; None where that needs files not here."""
    try:
        return Study.from_dict(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError):
        return None  # the rows say what was done all the same


def _cell(study: str, cell: str, rows: pd.DataFrame, wanted: int | None) -> CellProgress:
    losses = rows.loc[rows["status"] == FINISHED, "loss"].dropna()
    last, spent = rows["started_at"].max(), _spent(rows, None)
    return CellProgress(
        study=study,
        cell=cell,
        statuses={str(s): int(n) for s, n in rows["status"].value_counts().items()},
        wanted=wanted,
        best_loss=float(losses.min()) if len(losses) else None,
        last=None if pd.isna(last) else last.strftime("%Y-%m-%d %H:%M:%S"),
        gpu_hours=spent["gpu_hours"],
        mfu=spent["mfu"],
    )
