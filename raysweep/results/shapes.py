"""Counts of imported runs from the shape of their model, where no count is given."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.study.shape import Counts, ModelShape, count

N = "params_active_non_embedding"
OFF = 0.05
"""A given count further than this from the shape's counts something else."""

_COUNTED = (
    N,
    "params_total_non_embedding",
    "params_active",
    "params_total",
    "params_dense",
    "flops_per_token",
)
_SHAPE = (
    "d_model", "layers", "heads", "kv_heads", "d_ff", "vocab_size", "sequence_length", "experts",
    "top_k", "shared_experts", "expert_ff", "moe_layers",
)  # fmt: skip
_TWO_MATRICES = ("gelu", "relu", "relu2", "squared_relu", "gelu_new")
"""Activations of feed-forwards without a gate, of two matrices where SwiGLU has three. (`silu` is
what models with SwiGLU say.)"""


def count_shapes(
    rows: Mapping[str, pd.Series], recipe: Mapping[str, pd.Series]
) -> tuple[dict[str, pd.Series], list[str]]:
    """Counts that are missing from mapped columns, and sentences on them.

    A shape needs width and depth; without a feed-forward width it has the usual 8/3 of the model's
    (with a gate; 4 without), without heads those of 64. Embeddings count where the vocabulary is
    known, FLOPs where the sequence length is too. A count that is given stays, and is held against
    the shape's. Where N fits feed-forwards without a gate only, they have none; where it fits
    neither, nothing else is counted.
    """
    if "d_model" not in rows or "layers" not in rows:
        return {}, []
    known = pd.DataFrame({n: rows[n] for n in _SHAPE if n in rows}).reindex(columns=list(_SHAPE))
    activation = recipe.get("activation", pd.Series(None, index=known.index, dtype=object))
    known["gated"] = ~activation.astype(str).str.lower().isin(_TWO_MATRICES)
    params = rows.get(N, pd.Series(np.nan, index=known.index))
    table = _counted(known)
    apart = params.notna() & table[N].notna() & ~_agree(params, table[N])
    gated = known[apart & known["gated"]]
    if len(gated):
        plain = _counted(gated.assign(gated=False))
        plain = plain[_agree(params[gated.index], plain[N])]
        table.loc[plain.index] = plain
        apart[plain.index] = False
    found: dict[str, pd.Series] = {}
    for name in _COUNTED:
        given = rows.get(name, pd.Series(np.nan, index=known.index))
        filled = given.where(given.notna() | apart, table[name])
        if filled.notna().any():
            found[name] = filled
    notes: list[str] = []
    made = params.isna() & table[N].notna()
    if made.any():
        how = _assumed(rows, recipe)
        notes.append(f"N of {int(made.sum())} rows is counted from the shape{how}")
    sparse = known["experts"] > 1
    for part in (sparse, ~sparse) if "d_ff" in rows or "expert_ff" in rows else ():
        if (apart & part).sum() > (params.notna() & part).sum() / 2:
            notes.append(_unlike(params[apart & part], table[apart & part]))
    return found, notes


def _counted(known: pd.DataFrame) -> pd.DataFrame:
    """What the shape of each row counts, a column each of `_COUNTED`."""
    plain = known.fillna(0.0)
    shapes = plain.drop_duplicates()
    counts = pd.DataFrame([_counts(row) for row in shapes.to_dict("records")], index=shapes.index)
    table = plain.merge(pd.concat([shapes, counts], axis=1), how="left", on=[*_SHAPE, "gated"])
    return table.set_index(known.index)[list(_COUNTED)]


def _agree(given: pd.Series, counted: pd.Series) -> pd.Series:
    """Whether a given count is that of the shape; not where one of the two is missing."""
    return (given / counted - 1).abs() <= OFF


def _unlike(params: pd.Series, table: pd.DataFrame) -> str:
    """What to say of given N that are not what their shapes count."""
    ratio = params / table[N]
    said = (
        f"{N} is {ratio.median():.2f} times what the shape counts without embeddings (in "
        f"{len(params)} rows), so nothing else is counted from it"
    )
    whole = table["params_total_non_embedding"]
    total = _agree(params, whole) | _agree(params, table["params_total"])
    if (total & (whole > table[N])).sum() > len(params) / 2:
        said += ": it counts all experts; map it to params_total"
    else:
        said += ": it may count embeddings" if ratio.median() > 1 else ""
    return said + "; leave it out to count the shape"


def _assumed(rows: Mapping[str, pd.Series], recipe: Mapping[str, pd.Series]) -> str:
    if "d_ff" not in rows and "expert_ff" not in rows:
        parts = ["a feed-forward of the usual width"]
    else:
        parts = [] if "activation" in recipe else ["feed-forwards with a gate, as in SwiGLU"]
    parts += [] if "vocab_size" in rows else ["no vocabulary, so without embeddings"]
    return f" ({'; '.join(parts)})" if parts else ""


def _counts(row: Mapping[Hashable, float]) -> dict[str, float]:
    """What a shape counts; NaN for what it does not tell."""
    d, layers = int(row["d_model"]), int(row["layers"])
    heads = int(row["heads"]) or max(1, d // 64)
    if d % heads or (d // heads) % 2:
        heads = 1
    kv_heads = int(row["kv_heads"]) or heads
    gate = 1.0 if row["gated"] else 2 / 3  # ours has three matrices
    experts = max(1, int(row["experts"]))
    width = row["d_ff"] or (8 / 3 if row["gated"] else 4) * d
    moe = experts > 1
    try:
        shape = ModelShape(
            d_model=d,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads if heads % kv_heads == 0 else heads,
            d_ff=max(1, round(gate * width)),
            vocab_size=int(row["vocab_size"]) or 1,
            sequence_length=int(row["sequence_length"]) or 1,
            qk_norm=False,
            experts=experts,
            top_k=max(1, int(row["top_k"])),
            shared_experts=int(row["shared_experts"]) if moe else 0,
            expert_ff=round(gate * (row["expert_ff"] or width)) if moe else 0,
            moe_layers=tuple(range(int(row["moe_layers"]) or layers)) if moe else (),
        )
    except UserError:
        return dict.fromkeys(_COUNTED, math.nan)
    found, twin = count(shape), count(shape.dense_twin())
    return _as_dict(found, twin, bool(row["vocab_size"]), bool(row["sequence_length"]))


def _as_dict(found: Counts, twin: Counts, vocabulary: bool, length: bool) -> dict[str, float]:
    return {
        N: found.params_active_non_embedding,
        "params_total_non_embedding": found.params_total_non_embedding,
        "params_active": found.params_active if vocabulary else math.nan,
        "params_total": found.params_total if vocabulary else math.nan,
        "params_dense": twin.params_active_non_embedding,
        "flops_per_token": found.flops_per_token if vocabulary and length else math.nan,
    }
