"""What may be served: the architectures of a study, as models of any size, from its own rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from raysweep.scaling.compute.roofline import ServedModel
from raysweep.scaling.runs import SIX_N, Trend, token_cost


@dataclass(frozen=True)
class Candidate:
    """A way to build models of any size, and their training FLOPs a token against active N.
    `trained` says whether the study did so."""

    name: str
    model: ServedModel
    trained: bool = True
    cost: Trend = SIX_N

    @property
    def experts(self) -> float:
        return self.model.experts


def candidates_of(cells: pd.DataFrame, experts: Sequence[float] = ()) -> list[Candidate]:
    """The architectures of a cell table, each after its largest cell, fewest experts first.

    With `experts`, those that have so many; a number that no architecture has stands for the one
    with the most experts, with their number changed, and is not `trained`."""
    found = []
    for name, own in cells.groupby("architecture", sort=False):
        largest = own.iloc[int(own["params_active_non_embedding"].to_numpy(float).argmax())]
        found.append(Candidate(str(name), served_model(largest), cost=token_cost(own)))
    found.sort(key=lambda c: c.experts)
    if not experts or not found:
        return found
    like = found[-1]
    chosen = []
    for count in sorted(set(map(float, experts))):
        own_count = [c for c in found if c.experts == count]
        name, model = f"{like.name} with {count:g} experts", replace(like.model, experts=count)
        chosen += own_count or [replace(like, name=name, model=model, trained=False)]
    return chosen


def served_model(row: pd.Series) -> ServedModel:
    """The model of one cell: shares of experts by its counts, the shape by its layers and width.

    Of numbers that the row lacks those of the source stand in (`ServedModel`'s defaults)."""

    def number(column: str) -> float:
        value = row.get(column, math.nan)
        return float(value) if pd.notna(value) else math.nan

    dense, total = number("params_dense"), number("params_total_non_embedding")
    active, experts = number("params_active_non_embedding"), number("experts")
    used = number("top_k") if experts > 1 else 1.0
    known: dict[str, float] = {"experts": experts, "top_k": used}
    if experts > used and dense > 0 and total > active:
        share = (total - active) / (experts - used) / dense
        known |= {"expert_share": share, "fixed_share": active / dense - used * share}
    elif experts == 1:
        known |= {"expert_share": 0.0, "fixed_share": 1.0}
        dense = active
    layers, width = number("layers"), number("d_model")
    if layers > 0 and width > 0:
        known["aspect"] = width / layers
        if dense > 0:
            known["width_params"] = dense / (layers * width**2)
        embedded = number("params_total") - total
        if embedded > 0:
            known["embedding"] = embedded / width
    known["kv_share"] = number("kv_heads") / number("heads")
    known["granularity"] = number("granularity")
    return ServedModel(math.nan, **{k: v for k, v in known.items() if math.isfinite(v)})
