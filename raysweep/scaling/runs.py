"""From a few numbers to a run: every count that a law may want, after cells already measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.study.shape import RunSize

SAME = 0.02
"""Runs of one routing whose N and D agree within this share are of one cell."""

FEED_FORWARD = 2 / 3
"""Share of the non-embedding parameters in feed-forward blocks where no cell tells it."""

AXES = {"N": "params_active_non_embedding", "D": "tokens", "FLOPs": "flops"}
"""What a run's distance from the cells is told in, and the column of each."""


def describe_run(
    cells: pd.DataFrame,
    params: float,
    tokens: float,
    *,
    experts: int,
    top_k: int,
    group: str = "",
) -> RunSize:
    """Every count of a run of `params` active non-embedding parameters, after `cells`.

    A run of the size of one of the cells is that cell. Else see `RunMaker`.

    Raises:
        UserError: a number of parameters or tokens that is not positive.
    """
    for name, value in (("params", params), ("tokens", tokens)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} must be above zero, not {value}")
    own = cells[(cells["experts"] == experts) & (cells["top_k"] == top_k)]
    own = own[own["group"] == group] if group else own
    if len(own):
        off = np.abs(np.log(own[[AXES["N"], AXES["D"]]].to_numpy(float) / [params, tokens])).max(1)
        if off.min() < SAME:
            return size_of(own.index[int(off.argmin())], own.iloc[int(off.argmin())])
    return RunMaker.after(cells, experts=experts, top_k=top_k, group=group)(params, tokens)


@dataclass(frozen=True)
class RunMaker:
    """Describes new runs of one routing after cells, of any size, quickly.

    Embeddings grow as the width does, with N^(1/3), from the largest cell; FLOPs a token follow the
    cells' own trend in N, never below 6 N; routed experts keep the share of active parameters that
    they have in the cells."""

    experts: int
    top_k: int
    group: str
    largest: float
    """N of the largest cell; of it are the next two."""
    embedding: float
    head: float
    twin: float
    expert_share: float
    flops: tuple[float, float] | None
    """ln FLOPs a token = level + slope ln N, where cells tell them."""

    @classmethod
    def after(cls, cells: pd.DataFrame, *, experts: int, top_k: int, group: str = "") -> RunMaker:
        """What runs have in common with `cells`."""
        largest = cells.iloc[int(cells[AXES["N"]].to_numpy(float).argmax())]
        n0 = float(largest[AXES["N"]])
        return cls(
            experts=experts,
            top_k=top_k,
            group=group,
            largest=n0,
            embedding=float(largest["params_active"]) - n0,
            head=float(largest["d_model"]) * float(largest["vocab_size"]),
            twin=float((cells["params_dense"] / cells[AXES["N"]]).median()),
            expert_share=expert_share(cells) or FEED_FORWARD,
            flops=_flops_per_token(cells),
        )

    def __call__(self, params: float, tokens: float) -> RunSize:
        """The run of `params` active non-embedding parameters on `tokens` tokens."""
        ratio, share = self.experts / self.top_k, self.expert_share
        total = params if self.experts == 1 else params * (1 - share + share * ratio)
        wider = (params / self.largest) ** (1 / 3)
        embedding = self.embedding * wider
        # Results that give one count for all tell nothing of a head.
        head = self.head * wider if math.isfinite(self.head) else embedding / 2 or math.nan
        each = 6 * params
        if self.flops is not None:
            level, slope = self.flops
            each = max(each, math.exp(level + slope * math.log(params)))
        return RunSize(
            params_active_non_embedding=params,
            tokens=tokens,
            experts=self.experts,
            top_k=self.top_k,
            params_total_non_embedding=total,
            params_active=params + embedding,
            params_total=total + embedding,
            params_dense=self.twin * params,
            head_params=head,
            flops=each * tokens,
            group=self.group,
        )


def size_of(name: object, row: pd.Series) -> RunSize:
    """The size of a cell's runs, from its row of the cell table."""

    def number(column: str) -> float:
        return float(row[column]) if column in row and pd.notna(row[column]) else math.nan

    active, total = number("params_active_non_embedding"), number("params_total_non_embedding")
    return RunSize(
        params_active_non_embedding=active,
        tokens=number("tokens"),
        experts=int(row["experts"]),
        top_k=int(row["top_k"]),
        params_total_non_embedding=math.nan if total < active else total,
        params_active=number("params_active"),
        params_total=number("params_total"),
        params_dense=number("params_dense"),
        head_params=number("d_model") * number("vocab_size"),
        flops=number("flops"),
        group=str(row.get("group", "")),
        name=str(name),
    )


def expert_share(cells: pd.DataFrame) -> float | None:
    """Share of the active non-embedding parameters in routed experts, from the largest MoE cell."""
    total, active = cells["params_total_non_embedding"], cells[AXES["N"]]
    moe = cells[(cells["experts"] > cells["top_k"]) & (total > active)]
    if not len(moe):
        return None
    row = moe.iloc[int(moe[AXES["N"]].to_numpy(float).argmax())]
    one = float(row["params_total_non_embedding"]) - float(row[AXES["N"]])
    expert = one / float(row["experts"] - row["top_k"])
    return min(1.0, float(row["top_k"]) * expert / float(row[AXES["N"]]))


def _flops_per_token(cells: pd.DataFrame) -> tuple[float, float] | None:
    """The trend of ln FLOPs a token in ln N, as level and slope; None where none are counted."""
    exact = cells[cells["flops_exact"]]
    if not len(exact):
        return None
    n, f = np.log(exact[[AXES["N"], "flops_per_token"]].to_numpy(float)).T
    if np.ptp(n) < 1e-9:
        return float(f.mean() - n.mean()), 1.0
    slope, level = np.polyfit(n, f, 1)
    return float(level), float(slope)


def extrapolation(cells: pd.DataFrame, run: RunSize) -> dict[str, float]:
    """How many times the largest N, D and FLOPs among cells a run has; below 1 how many times the
    smallest; 1 inside their range."""
    asked = {"N": run.params_active_non_embedding, "D": run.tokens, "FLOPs": run.compute}
    factors = {}
    for axis, column in AXES.items():
        low, high = float(cells[column].min()), float(cells[column].max())
        factors[axis] = asked[axis] / float(np.clip(asked[axis], low, high))
    return factors
