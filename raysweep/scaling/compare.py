"""compare(results) -> Comparison: two or more studies or architectures, one beside the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from raysweep.display import InNotebooks
from raysweep.errors import UserError
from raysweep.results.store import Results
from raysweep.scaling.contrast import (
    Contrast,
    MatchedCell,
    contrast_matched,
    contrast_optima,
    matched_cells,
)
from raysweep.scaling.contrast_loss import contrast_losses
from raysweep.scaling.fits import ALL, fit
from raysweep.scaling.plain import plain
from raysweep.scaling.quantities import QUANTITIES
from raysweep.scaling.sides import Side, Source, differences, doubts, make_side, parts_of, why_apart
from raysweep.text import estimated

MOST_SIDES = 6
"""Sides told apart in one figure."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One side over another. `apart` says why their losses are not compared, empty where they
    are; `doubt` what to bear in mind where they are."""

    reference: str
    other: str
    contrasts: tuple[Contrast, ...]
    cells: tuple[MatchedCell, ...]
    apart: str
    doubt: str

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "reference": self.reference,
            "other": self.other,
            "contrasts": [asdict(c) for c in self.contrasts],
            "cells": [asdict(c) for c in self.cells],
            "losses_not_compared": self.apart,
            "doubt": self.doubt,
        }


@dataclass(frozen=True, eq=False)
class Comparison(InNotebooks):
    """Sides, each fitted alone, and pairs of them; ratios are the other's over the reference's."""

    asked: tuple[str, ...]
    """The results, as `compare` takes them."""
    architectures: tuple[str, ...]
    """Those it was restricted to; empty for all."""
    sides: tuple[Side, ...]
    pairs: tuple[Pair, ...]
    differences: tuple[dict[str, object], ...]

    def side(self, label: str) -> Side:
        """The side of this label."""
        return next(s for s in self.sides if s.label == label)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: what `raysweep compare --json` prints."""
        groups = {
            s.label: next((g for n, g in s.fits.groups.items() if n != ALL), None)
            for s in self.sides
        }
        result = plain(
            {
                "sides": [s.to_dict() for s in self.sides],
                "pairs": [p.to_dict() for p in self.pairs],
                "differences": list(self.differences),
                "cells": {s.label: s.fits.cells for s in self.sides},
                "groups": {k: g for k, g in groups.items() if g is not None},
            }
        )
        assert isinstance(result, dict)
        return result

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{s.label}: {len(s.fits.cells)} cells, {s.n_rows} trials" for s in self.sides]
        for difference in self.differences:
            values = difference["values"]
            assert isinstance(values, list)
            lines.append(f"  {difference['trait']}: {' | '.join(values)}")
        for pair in self.pairs:
            lines += ["", f"{pair.other} over {pair.reference}", *_pair_lines(pair)]
        return "\n".join(lines)


def compare(
    results: Sequence[str | os.PathLike[str] | Results],
    *,
    architectures: Sequence[str] = (),
    n_boot: int = 200,
    seed: int = 0,
) -> Comparison:
    """Compare results folders, or the studies or architectures of one.

    Each of `results` is a folder, a URI, or either with `#STUDY` for one study of it. Each
    architecture is a side of its own; results given alone are parted by their studies too. A side
    is compared with that of the same architecture in the first results, else with the first side.
    Losses are compared only where they share a scale: one corpus, vocabulary, sequence length and
    kind of loss. Raises UserError where there are fewer than two sides or more than `MOST_SIDES`.
    """
    sources = [open_source(one) for one in results]
    parts = parts_of(sources, architectures)
    if len(parts) > MOST_SIDES:
        raise UserError(
            f"{len(parts)} sides to compare, at most {MOST_SIDES}: name fewer results, one study "
            "as RESULTS#STUDY, or one architecture"
        )
    sides = [make_side(part, fit(part.rows, n_boot=n_boot, seed=seed)) for part in parts]
    return Comparison(
        asked=tuple(f"{s.uri}#{study}" if study else s.uri for _, s, study in sources),
        architectures=tuple(architectures),
        sides=tuple(sides),
        pairs=tuple(
            pair_of(reference_of(sides, k), sides[k], n_boot, seed) for k in range(1, len(sides))
        ),
        differences=tuple(differences(sides)),
    )


def open_source(one: str | os.PathLike[str] | Results) -> tuple[str, Source, str | None]:
    """(short name, results, the one study that is meant or None)."""
    study = None
    if not isinstance(one, Results):
        uri, _, name = os.fspath(one).partition("#")
        one, study = Results.open(uri), name or None
    short = one.uri.rstrip("/").rsplit("/", 1)[-1]
    return short, one, study


def reference_of(sides: Sequence[Side], k: int) -> Side:
    """What the k-th side is compared with."""
    same = [s for s in sides[:k] if s.architecture == sides[k].architecture and s.origin == 0]
    return same[0] if same else sides[0]


def pair_of(reference: Side, other: Side, n_boot: int, seed: int) -> Pair:
    """One side over another, in all that may be compared."""
    apart = why_apart(reference, other)
    a, b = reference.fits, other.fits
    contrasts = contrast_optima(reference, other, with_loss=not apart, n_boot=n_boot, seed=seed)
    cells: list[MatchedCell] = []
    if not apart:
        cells = matched_cells(a.cells, b.cells)
        matched = contrast_matched(cells, n_boot=n_boot, seed=seed)
        contrasts += [matched, *contrast_losses(a, b, matched, seed=seed)]
    return Pair(
        reference=reference.label,
        other=other.label,
        contrasts=tuple(contrasts),
        cells=tuple(cells),
        apart=apart,
        doubt="" if apart else doubts(reference, other),
    )


def _pair_lines(pair: Pair) -> list[str]:
    lines, how = [], ""
    for c in pair.contrasts:
        if c.how != how:
            how = c.how
            lines.append(f"  by {how}:")
        name = f"{QUANTITIES[c.quantity].optimal} at equal {c.at_equal}"
        if not c.ok:
            text = f"{c.status}: {c.message}"
        else:
            text = estimated(c.ratio, c.low, c.high, style="number")
            text += f"; {c.message}" if c.message else ""
        lines.append(f"    {name:<42} {text}")
    if pair.apart:
        lines.append(f"  losses are not compared: {pair.apart}")
    if pair.doubt:
        lines.append(f"  note: {pair.doubt}")
    return lines
