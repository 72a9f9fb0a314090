"""The sides of a comparison: parts of results tables, and whether their losses share a scale."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.schema import FINISHED
from raysweep.scaling.cells import cell_table
from raysweep.scaling.fits import Fits
from raysweep.scaling.shared_error import shared_error

FINAL_LOSS = "final validation loss"
"""The loss of rows whose recipe does not name another: what `raysweep run` writes."""

LOSS_SCALE = {
    "data_hash": "corpora",
    "vocab_size": "vocabularies",
    "sequence_length": "sequence lengths",
}
"""Columns that set the scale of a loss, and what differs where they do."""

_TRAITS = ("architecture_kind", "experts", "top_k", "shared_experts", *LOSS_SCALE, "device")
"""What is said of a side beside its recipe."""


class Source(Protocol):
    """Where rows come from, such as `raysweep.results.store.Results`."""

    @property
    def uri(self) -> str: ...

    def frame(self) -> pd.DataFrame:
        """One row a trial, columns of `results.schema`."""
        ...


@dataclass(frozen=True, eq=False)
class Side:
    """One architecture of one source: its rows' traits, and what was fitted to them alone."""

    label: str
    origin: int
    """Sides of one number come from the same results or the same study of them; 0 is the first."""
    uri: str
    studies: tuple[str, ...]
    architecture: str
    n_rows: int
    traits: dict[str, tuple[str, ...]]
    """Distinct values, as text, of what the rows say of themselves; empty where they do not."""
    loss_kind: tuple[str, ...]
    sources: tuple[str, ...]
    fits: Fits
    shared_error: np.ndarray
    """Variance [2] of (ln learning rate, ln batch) that all its optima share."""

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {
            "label": self.label,
            "results": self.uri,
            "studies": list(self.studies),
            "architecture": self.architecture,
            "n_rows": self.n_rows,
            "n_cells": len(self.fits.cells),
            "traits": {k: list(v) for k, v in self.traits.items()},
            "loss_kind": list(self.loss_kind),
        }


@dataclass(frozen=True)
class Part:
    """The rows of one side before anything is fitted."""

    label: str
    origin: int
    uri: str
    architecture: str
    rows: pd.DataFrame


def parts_of(
    sources: Sequence[tuple[str, Source, str | None]], architectures: Sequence[str] = ()
) -> list[Part]:
    """The sides of `sources`, each (name, source, the one study meant or None): one an
    architecture.

    A source that stands alone is parted by its studies too. Raises UserError for a study or an
    architecture that is not there, and where fewer than two sides are left.
    """
    found: list[tuple[tuple[str, int], str, str, pd.DataFrame]] = []
    origins = itertools.count()
    for name, source, study in sources:
        frame = source.frame()
        studies = frame["study"].astype(str)
        if study is not None and not (studies == study).any():
            known = ", ".join(dict.fromkeys(studies)) or "none"
            raise UserError(f"no study {study!r} in {source.uri}; its studies: {known}")
        alone = len(sources) == 1
        for own, rows in _by_study(frame, studies, study, alone):
            origin = own or name, next(origins)
            for architecture, part in rows.groupby(_architecture(rows), sort=False):
                found.append((origin, source.uri, str(architecture), part))
    known = dict.fromkeys(architecture for _, _, architecture, _ in found)
    missing = [a for a in architectures if a not in known]
    if missing:
        raise UserError(f"no architecture {missing[0]!r} in the results; known: {', '.join(known)}")
    found = [f for f in found if not architectures or f[2] in architectures]
    if len(found) < 2:
        raise UserError(
            "a comparison needs two sides: name two results folders, or one that holds two studies "
            "or two architectures"
        )
    one_name = len({origin for origin, *_ in found}) == 1
    several = len({architecture for _, _, architecture, _ in found}) > 1
    labels = [
        architecture if one_name else f"{name} {architecture}" if several else name
        for (name, _), _, architecture, _ in found
    ]
    return [
        Part(label, origin, uri, architecture, rows)
        for label, ((_, origin), uri, architecture, rows) in zip(
            _unique(labels), found, strict=True
        )
    ]


def _by_study(
    frame: pd.DataFrame, studies: pd.Series, wanted: str | None, alone: bool
) -> Iterator[tuple[str, pd.DataFrame]]:
    names = list(dict.fromkeys(studies))
    if wanted is not None:
        yield wanted, frame[studies == wanted]
    elif alone and len(names) > 1:
        for name in names:
            yield name, frame[studies == name]
    else:
        yield "", frame


def _architecture(rows: pd.DataFrame) -> pd.Series:
    return rows["architecture"].astype(object).fillna("unnamed").astype(str)


def _unique(labels: Sequence[str]) -> list[str]:
    """Labels told apart by a number where two are the same."""
    seen: dict[str, int] = {}
    unique = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        unique.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return unique


def make_side(part: Part, fits: Fits) -> Side:
    """A side of its rows and the fits of these."""
    rows = part.rows
    counted = rows[(rows["status"] == FINISHED) & rows["excluded"].isna()]
    counted = counted if len(counted) else rows
    recipes = [_recipe(text) for text in counted["recipe"].dropna().unique()]
    traits = {name: _values(counted, name) for name in _TRAITS}
    for key in dict.fromkeys(key for recipe in recipes for key in recipe if key != "loss"):
        values = dict.fromkeys(str(r[key]) for r in recipes if r.get(key) is not None)
        traits[key] = tuple(values)
    kinds = dict.fromkeys(str(r.get("loss") or FINAL_LOSS) for r in recipes) or {FINAL_LOSS: None}
    return Side(
        label=part.label,
        origin=part.origin,
        uri=part.uri,
        studies=_values(rows, "study"),
        architecture=part.architecture,
        n_rows=len(rows),
        traits=traits,
        loss_kind=tuple(kinds),
        sources=_values(counted, "source"),
        fits=fits,
        shared_error=shared_error(cell_table(rows).searched()),
    )


def _values(rows: pd.DataFrame, column: str) -> tuple[str, ...]:
    if column not in rows:
        return ()
    values = rows[column].dropna().unique()
    return tuple(str(v).removesuffix(".0") for v in values)


def _recipe(text: object) -> Mapping[str, Any]:
    try:
        found = json.loads(str(text))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def why_apart(a: Side, b: Side) -> str:
    """Why the losses of two sides lie on different scales; empty where they may be compared."""
    if a.loss_kind != b.loss_kind or len(a.loss_kind) > 1:
        return f"different losses: {_listed(a.loss_kind)} against {_listed(b.loss_kind)}"
    for column, what in LOSS_SCALE.items():
        one, two = a.traits[column], b.traits[column]
        for side, values in ((a, one), (b, two)):
            if len(values) > 1:
                return f"{side.label} mixes {what} ({_listed(values)})"
        if one and two and one != two:
            return f"different {what} ({_listed(one)} against {_listed(two)})"
    hashed = [bool(side.traits["data_hash"]) for side in (a, b)]
    if hashed[0] != hashed[1]:
        told = (a, b)[hashed.index(False)]
        return f"the rows of {told.label} do not say which corpus they were trained on"
    if not any(hashed) and a.sources != b.sources:
        return "the rows do not say which corpora they were trained on"
    return ""


def doubts(a: Side, b: Side) -> str:
    """What speaks against comparing losses that may be compared, in a sentence; else empty."""
    if not a.traits["data_hash"]:
        return (
            f"the rows of {a.label} and {b.label} do not say their corpus; their losses are "
            "compared as if it were one"
        )
    return ""


def differences(sides: Sequence[Side]) -> list[dict[str, object]]:
    """What the rows say of themselves that is not the same on all sides."""
    found = []
    for trait in dict.fromkeys(name for side in sides for name in side.traits):
        values = [side.traits.get(trait, ()) for side in sides]
        if len(set(values)) > 1:
            found.append({"trait": trait, "values": [_listed(v) or "not said" for v in values]})
    kinds = [side.loss_kind for side in sides]
    if len(set(kinds)) > 1:
        found.append({"trait": "loss", "values": [_listed(k) for k in kinds]})
    return found


def _listed(values: Sequence[str], most: int = 3) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more
