"""What `raysweep import` says: rows, cells, columns, ranges and doubts, and what is next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from raysweep.results.columns import recipe_columns
from raysweep.results.importers import Imported
from raysweep.results.schema import FINISHED
from raysweep.scaling.cells import CellTable, cell_table
from raysweep.scaling.datasets import data_sets
from raysweep.scaling.quantities import QUANTITIES
from raysweep.text import short

_RANGES: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("params_active_non_embedding", "N", "active non-embedding parameters", short),
    ("tokens", "D", "tokens", short),
    ("learning_rate", "learning rate", "", "{:.3g}".format),
    ("batch_tokens", "batch", "tokens", short),
    ("loss", "loss", "nats a token", "{:.4g}".format),
)


def said_of_import(found: Imported, everything: pd.DataFrame, uri: str) -> list[str]:
    """Lines on what was just imported; `everything` are all rows of the folder `uri`."""
    rows = found.rows
    lines = [
        f"  {count} kept out of fits: {reason}"
        for reason, count in rows["excluded"].value_counts().items()
    ]
    over = rows["status"][rows["excluded"].isna() & (rows["status"] != FINISHED)]
    lines += [f"  {count} {status}" for status, count in over.value_counts().items()]
    table = cell_table(rows)
    lines += [_cells(table), *_ranges(table.trials)]
    lines.append("columns used: " + (", ".join(found.used) or "none"))
    if found.guessed:
        told = ", ".join(f"{ours}={theirs}" for ours, theirs in found.guessed.items())
        lines.append(f"  guessed by their names (--map changes it): {told}")
    if found.ignored:
        lines.append("columns ignored: " + ", ".join(found.ignored))
    if len(found.curves):
        count = _many(found.curves["trial_key"].nunique(), "run")
        lines.append(f"curves of {count}, {len(found.curves)} points")
    notes = (*_stand_already(rows, everything), *found.notes, *table.messages)
    lines += [f"warning: {text}" for text in notes]
    sets = data_sets(everything.reset_index(drop=True))
    if sets.nunique() > max(1, data_sets(rows.reset_index(drop=True)).nunique()):
        names = ", ".join(sorted(set(sets)))
        lines.append(
            f"the folder now holds {sets.nunique()} sets of data ({names}), fitted apart; import "
            "with --data NAME what shares data"
        )
    kinds = [k for k in ("optimizer", "schedule") if _values(table.trials, k) > 1]
    uri += f" --group {','.join(kinds)}" if kinds else ""
    lines.append(f"next: raysweep fit {uri}")
    lines.append(f"      raysweep report {uri}")
    if len(table.trials) and table.cells["n_searched"].any():
        params = 10 * float(table.cells["params_active_non_embedding"].max())
        tokens = 10 * float(table.cells["tokens"].max())
        size = f"--params {short(params)} --tokens {short(tokens)}"
        lines.append(f"      raysweep recommend {uri} {size}")
    return lines


TOLD = ("params_active_non_embedding", "tokens", "learning_rate", "batch_tokens", "loss")
"""Of these a run is known again."""


def _stand_already(rows: pd.DataFrame, everything: pd.DataFrame) -> list[str]:
    """What speaks of rows that the folder holds from an earlier import."""
    keys = ["study", "trial_key"]
    both = rows.merge(everything, on=keys, suffixes=("", "_kept"))
    other = [
        name
        for name in (*TOLD, "data_hash", "status")
        if not _texts(both[name]).equals(_texts(both[f"{name}_kept"]))
    ]
    said = []
    if other:
        said.append(
            f"rows that stand here already were kept as they are, though {', '.join(other)} "
            "would be read otherwise now: to read them anew, import into another folder"
        )
    own = everything.merge(rows[keys], on=keys)
    rest = everything[~everything["trial_key"].isin(own["trial_key"])]
    told = [name for name in TOLD if rows[name].notna().any()]
    twice = len(rows[told].drop_duplicates().merge(rest[told].drop_duplicates(), on=told))
    if "loss" in told and twice > len(rows) / 2:
        said.append(
            f"{twice} of these runs stand here twice, from another import: where it is the same "
            "table with other columns, import it alone into another folder"
        )
    return said


def _texts(values: pd.Series) -> pd.Series:
    return values.astype(object).where(values.notna(), "").astype(str)


def _values(trials: pd.DataFrame, key: str) -> int:
    recipes = recipe_columns(trials)
    return int(recipes[key].nunique()) if key in recipes else 0


def _cells(table: CellTable) -> str:
    cells = table.cells[table.cells["n_finished"] > 0]
    if not len(cells):
        return "no row counts: nothing can be fitted"
    per = cells["n_finished"]
    trials = _span([float(per.min()), float(per.max())], "{:g}".format)
    runs = "trial each" if trials == "1" else "trials each"
    said = f"{len(table.trials)} rows count, in {_many(len(cells), 'cell')} of {trials} {runs}"
    said += f" ({', '.join(dict.fromkeys(cells['architecture']))})"
    if not (cells["n_searched"] > 0).any():
        said += "; none tells both learning rate and batch, so only laws of the loss follow"
        if table.trials["learning_rate"].notna().any():
            said += " (if all ran at one batch: --map batch_tokens==TOKENS)"
        return said
    fixed = [QUANTITIES[name].name for name, varied in table.varied.items() if not varied]
    if fixed:
        said += f"; no cell varies its {' or '.join(fixed)}: its optimum cannot be told"
    return said


def _ranges(trials: pd.DataFrame) -> list[str]:
    found = []
    for column, name, unit, show in _RANGES:
        values = trials[column][trials[column] > 0]
        if len(values):
            span = _span([float(values.min()), float(values.max())], show)
            found.append(f"{name} {span}{' ' if unit else ''}{unit}")
    return ["  " + ", ".join(found)] if found else []


def _span(ends: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = map(show, ends)
    return low if low == high else f"{low} to {high}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
