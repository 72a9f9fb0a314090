"""Data sets: which rows of a results table were trained and measured on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

_TRAITS = ("validation_sequences", "sequence_length")
"""What of a study, beside its data, decides on which text its losses are measured."""


@dataclass
class _Set:
    """Studies that share data; `traits` hold the known values of each of `_TRAITS`."""

    data: str
    traits: list[frozenset[float]]
    studies: list[str]


def data_sets(rows: pd.DataFrame) -> pd.Series:
    """The data set of each row, as a label: "" for all where there is one set only.

    Rows share a set where their `data_hash` (a hash of the tokens, or a name given at import) is
    the same and their studies measure on a slice of the same size (`validation_sequences` and
    `sequence_length`; what a study does not say holds against nobody). Rows without `data_hash`
    are of their study's data, where other rows of the study tell it; else each such study is a set
    of its own, because nothing says that two of them share data. The label is the name of the data
    where it was given one, else the studies' names.

    `rows` has the columns of `results.schema`.
    """
    study = rows["study"].astype(object).where(rows["study"].notna(), "").astype(str)
    data = rows["data_hash"].astype(object)
    data = data.where(data.notna() & (data != ""), None)
    told = data.groupby(study, sort=False).agg(lambda d: list(d.dropna().unique()))
    only = study.map({name: known[0] for name, known in told.items() if len(known) == 1})
    data = data.where(data.notna(), only)
    known = data.notna()
    data = data.where(known, "").astype(str)
    key = pd.MultiIndex.from_arrays([study, data])
    sets: list[_Set] = []
    place: dict[tuple[str, str], int] = {}
    for pair, part in rows.groupby([study, data], sort=False):
        name, of = str(pair[0]), str(pair[1])
        traits = [frozenset(part[t].dropna().astype(float)) for t in _TRAITS]
        for index, found in enumerate(sets):
            if of and found.data == of and _agree(found.traits, traits):
                found.traits = [a or b for a, b in zip(found.traits, traits, strict=True)]
                found.studies.append(name)
                place[name, of] = index
                break
        else:
            place[name, of] = len(sets)
            sets.append(_Set(of, traits, [name]))
    labels = [""] if len(sets) < 2 else _labels(sets)
    return pd.Series([labels[place[pair]] for pair in key], index=rows.index, dtype=object)


def said_of(sets: pd.Series, architectures: pd.Series) -> str:
    """One sentence on several data sets among rows; empty where there is one.

    `sets` are labels of `data_sets`, `architectures` the names before they are told apart."""
    names = sorted(set(sets))
    if len(names) < 2:
        return ""
    shared = architectures.groupby(sets).unique().explode().value_counts()
    apart = ", and architectures of one name bear that of their data" if (shared > 1).any() else ""
    return (
        f"the results hold {len(names)} sets of data ({_listed(names)}): their losses are not "
        f"comparable, so they are fitted apart{apart}; rows that share data say so in data_hash "
        "(raysweep import --data NAME)"
    )


def other_data(
    rows: pd.DataFrame, data_hash: str, validation_sequences: int | None, sequence_length: int
) -> str:
    """One sentence where rows of a folder are of other data than a study's; else empty."""
    own = (
        rows.iloc[:1]
        .reindex(columns=rows.columns)
        .assign(
            study="\x00own",
            data_hash=data_hash,
            validation_sequences=validation_sequences,
            sequence_length=sequence_length,
        )
    )
    if not len(own):
        return ""
    sets = data_sets(pd.concat([own, rows], ignore_index=True))
    apart = (sets != sets.iloc[0]).iloc[1:].to_numpy()
    if not apart.any():
        return ""
    studies = list(dict.fromkeys(rows["study"][apart].astype(str)))
    return (
        f"{int(apart.sum())} rows that are here already ({_listed(studies)}) are of other data or "
        "do not tell theirs: they are fitted apart from this study"
    )


def _agree(one: Sequence[frozenset[float]], other: Sequence[frozenset[float]]) -> bool:
    return all(a == b or not a or not b for a, b in zip(one, other, strict=True))


def _labels(sets: Sequence[_Set]) -> list[str]:
    """A distinct label a set: the name of its data, or its studies, told apart where needed."""
    labels = []
    for found in sets:
        named = found.data and not _is_hash(found.data)
        label = found.data if named else _listed(list(dict.fromkeys(found.studies))) or "unnamed"
        if label in labels and found.data and not named:
            label = f"{label} {found.data[:8]}"
        count = 2
        while label in labels:
            label = f"{label.removesuffix(f' #{count - 1}')} #{count}"
            count += 1
        labels.append(label)
    return labels


def _is_hash(text: str) -> bool:
    return len(text) >= 12 and all(c in "0123456789abcdef" for c in text.lower())


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
