"""How the laws of the optima change with the method that read the optima, and with the cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from raysweep.scaling.groups import Group
from raysweep.scaling.loss.data import levels
from raysweep.scaling.optima_laws import fit_law
from raysweep.scaling.optimum import Optimum
from raysweep.scaling.optimum_result import INTERIOR
from raysweep.scaling.power_law import Exponent, PowerLaw

REACH = 10.0
"""The variants are compared at this many times the compute of the largest cell."""

AS_REPORTED = "as reported"


@dataclass(frozen=True)
class Variant:
    """One law refitted in another way. `at` is what it predicts at the point of comparison."""

    name: str
    n_cells: int
    exponents: dict[str, Exponent]
    at: Exponent
    status: str
    message: str


@dataclass(frozen=True)
class Sensitivity:
    """A group's law of one optimum under other methods and other cells; the first variant is the
    law as reported. `params` (of the group's count) and `tokens` are the point of comparison."""

    law: str
    params: float
    tokens: float
    variants: tuple[Variant, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return asdict(self)


def group_sensitivity(
    group: Group, optima: Mapping[str, Mapping[str, Optimum]], method: str, seed: int = 0
) -> dict[str, Sensitivity]:
    """By target, how the group's best law changes; empty where it has none.

    `optima` are those of every method by cell, `method` the one reported."""
    found = {}
    for target in ("learning_rate", "batch_tokens"):
        law = group.best_law(target)
        if law is None:
            continue
        largest = group.cells.iloc[-1]
        point = {
            "params": float(largest[group.count]) * math.sqrt(REACH),
            "tokens": float(largest["tokens"]) * math.sqrt(REACH),
            "flops": float(largest["flops"]) * REACH,
        }
        others = {name: float(largest[name]) for name in law.inputs if name not in point}
        variants = [_variant(AS_REPORTED, law, point | others)]
        for name, check in group.methods.items():
            other = check.laws.get(law.name)
            if name != method and other is not None:
                variants.append(_variant(f"optima by {name}", other, point | others))
        for name, cells, chosen in _filters(group.cells, optima[method]):
            other = fit_law(
                target, law.inputs, cells, chosen, count=group.count, n_boot=50, seed=seed
            )
            variants.append(_variant(name, other, point | others))
        found[target] = Sensitivity(law.name, point["params"], point["tokens"], tuple(variants))
    return found


def _filters(
    cells: pd.DataFrame, optima: Mapping[str, Optimum]
) -> Iterator[tuple[str, pd.DataFrame, Mapping[str, Optimum]]]:
    """Other choices of cells that a reader might have made: (what, cells, optima)."""
    seen = []
    for column, words in (("params_active_non_embedding", "size"), ("tokens", "horizon")):
        level = levels(cells[column].to_numpy(float))
        if level.max() < 2:
            continue
        for side, kept in (("smallest", level > 0), ("largest", level < level.max())):
            if not any((kept == other).all() for other in seen):
                seen.append(kept)
                yield f"{side} {words} left out", cells[kept], optima
    edges = [o for c in cells.index if (o := optima.get(c)) and o.status.startswith("edge")]
    if edges:
        yield "cells at an edge counted", cells, {**optima, **_as_interior(edges, optima)}


def _as_interior(edges: list[Optimum], optima: Mapping[str, Optimum]) -> dict[str, Optimum]:
    """Optima at an edge as if they lay there, known as well as the others on the median."""
    known = [o.own_covariance for o in optima.values() if o.interior]
    usual = np.median(known, axis=0) if known else np.full((2, 2), np.nan)
    return {
        o.cell: replace(
            o,
            status=INTERIOR,
            own=np.log([o.learning_rate, o.batch_tokens]),
            own_covariance=usual,
        )
        for o in edges
    }


def _variant(name: str, law: PowerLaw, point: Mapping[str, float]) -> Variant:
    nothing = Exponent(math.nan, math.nan, math.nan)
    at = nothing
    if law.ok:
        low, high = law.interval(point, new_cell=False)
        at = Exponent(float(law.predict(point)), float(low), float(high))
    return Variant(name, law.n_cells, law.exponents, at, law.status, law.message)
