"""From a few numbers to a run: every count that a law may want, after cells already measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from raysweep.errors import UserError
from raysweep.study.shape import RunSize

MOST, HALVINGS = 1e9, 50
"""How far a count may be from the active non-embedding one, and how often that is halved."""

SAME = 0.02
"""Runs of one routing whose N and D agree within this share are of one cell."""

FEED_FORWARD = 2 / 3
"""Share of the non-embedding parameters in feed-forward blocks where no cell tells it."""

HEAD, ATTENTION = -2 / 3, -1 / 3
"""Over N, head and embeddings go with N to the first, as the width goes with N^(1/3), and attention
with N to the second."""

ONE_SIZE = -1 / 2
"""The same of what FLOPs take over 6 N, where one size alone tells them."""

FADES = -1 / 4
"""What falls less steeply is not of head and attention."""

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
class Trend:
    """A quantity of models of N parameters: `base` N, and a rest that over N is a power of N.

    Between the smallest and the largest model that told it the power is their own, `slope`; outside
    them `beyond`. Without a rest (`level` -inf) it is `base` N."""

    base: float
    level: float = -math.inf
    """ln (rest / N) at the centre."""
    slope: float = 0.0
    beyond: float = 0.0
    centre: float = 0.0
    """ln N, like the two that follow."""
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(
        cls, params: np.ndarray, quantity: np.ndarray, *, base: float = 0.0, beyond: float
    ) -> Trend:
        """Through models' N [n] and quantities [n], all above `base` N; `beyond` also stands for
        the slope where all are of one size. Errors count as shares of the whole quantity."""
        log_n, rest = np.log(params), quantity / params - base
        weight = (rest / (rest + base)) ** 2
        centre = float(np.average(log_n, weights=weight))
        level = float(np.average(np.log(rest), weights=weight))
        slope = beyond
        spread = float((weight * (log_n - centre) ** 2).sum() / weight.sum())
        if spread > 1e-9:
            slope = float(np.average((log_n - centre) * np.log(rest), weights=weight) / spread)
        return cls(base, level, slope, beyond, centre, float(log_n.min()), float(log_n.max()))

    def __call__(self, params: npt.ArrayLike) -> np.ndarray:
        """The quantity of models of N parameters."""
        params = np.asarray(params, dtype=float)
        log_n = np.log(params)
        inside = np.clip(log_n, self.low, self.high)
        along = self.slope * (inside - self.centre) + self.beyond * (log_n - inside)
        return params * (self.base + np.exp(self.level + along))


SIX_N = Trend(6.0)
"""Training FLOPs a token where no run tells them."""


def flops_trend(params: np.ndarray, per_token: np.ndarray) -> Trend:
    """Training FLOPs a token of any N, from runs' N [n] and FLOPs a token [n].

    What they take over 6 N, for head and attention, fades as in the runs, so that far larger models
    take 6 N; a ratio that is the same in all stays. Where N or FLOPs are counted so that some runs
    take less than 6 N, the ratio follows a power of N, held at its ends."""
    if not (per_token > 6 * params).all():
        return Trend.of(params, per_token, beyond=0.0)
    found = Trend.of(params, per_token, base=6.0, beyond=ONE_SIZE)
    return replace(found, beyond=min(0.0, max(-1.0, found.slope)))


def token_cost(cells: pd.DataFrame) -> Trend:
    """Training FLOPs a token against active non-embedding N, from the cells that tell them.

    All that charges a run which no cell has, charges this: `recommend`, `split`, `serving`. Where
    the largest tells its head, that and attention fade beyond the cells each in its own way."""
    exact = cells[cells["flops_exact"]] if "flops_exact" in cells else cells[:0]
    if not len(exact):
        return SIX_N
    params, per_token = exact[[AXES["N"], "flops_per_token"]].to_numpy(float).T
    found = flops_trend(params, per_token)
    largest = int(params.argmax())
    head = 6 * float((exact["d_model"] * exact["vocab_size"]).iloc[largest])
    share = head / (per_token[largest] - 6 * params[largest]) if found.base else math.nan
    if found.slope < FADES and 0 < share <= 1:
        return replace(found, beyond=float(share * HEAD + (1 - share) * ATTENTION))
    return found


def _embeddings(cells: pd.DataFrame) -> Trend:
    """Embeddings and head against active non-embedding N; NaN where no cell counts them."""
    params = cells[AXES["N"]].to_numpy(float)
    counted = cells["params_active"].to_numpy(float) - params
    if (own := counted > 0).any():
        return Trend.of(params[own], counted[own], beyond=HEAD)
    return Trend(math.nan if np.isnan(counted).all() else 0.0)


@dataclass(frozen=True)
class RunMaker:
    """Describes new runs of one routing after cells, of any size, quickly.

    Embeddings follow the cells, and grow as the width does, with N^(1/3), outside them; FLOPs a
    token are `token_cost`; routed experts keep the share of active parameters that they have in the
    cells."""

    experts: int
    top_k: int
    group: str
    largest: float
    """N of the largest cell; of it is the next."""
    head: float
    embedding: Trend
    twin: float
    expert_share: float
    cost: Trend

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
            head=float(largest["d_model"]) * float(largest["vocab_size"]),
            embedding=_embeddings(cells),
            twin=float((cells["params_dense"] / cells[AXES["N"]]).median()),
            expert_share=expert_share(cells) or FEED_FORWARD,
            cost=token_cost(cells),
        )

    def __call__(self, params: float, tokens: float) -> RunSize:
        """The run of `params` active non-embedding parameters on `tokens` tokens."""
        counts = {name: float(value) for name, value in self.counts(params).items()}
        head = self.head * (params / self.largest) ** (1 / 3)
        if not math.isfinite(head):
            # Results that give one count for all tell nothing of a head.
            head = (counts["params_active"] - params) / 2 or math.nan
        return RunSize(
            params_active_non_embedding=params,
            tokens=tokens,
            experts=self.experts,
            top_k=self.top_k,
            params_total_non_embedding=counts["params_total_non_embedding"],
            params_active=counts["params_active"],
            params_total=counts["params_total"],
            params_dense=counts["params_dense"],
            head_params=head,
            flops=float(self.cost(params)) * tokens,
            group=self.group,
        )

    def counts(self, params: npt.ArrayLike) -> dict[str, np.ndarray]:
        """Every count of models of `params` active non-embedding parameters."""
        active = np.asarray(params, dtype=float)
        ratio, share = self.experts / self.top_k, self.expert_share
        total = active if self.experts == 1 else active * (1 - share + share * ratio)
        embedding = self.embedding(active)
        return {
            "params_active_non_embedding": active,
            "params_total_non_embedding": total,
            "params_active": active + embedding,
            "params_total": total + embedding,
            "params_dense": self.twin * active,
        }

    def flops_per_token(self, count: str, params: npt.ArrayLike) -> np.ndarray:
        """Training FLOPs a token of models that have `params` of a count."""
        wanted = np.asarray(params, dtype=float)
        low, high = wanted / MOST, wanted * MOST
        for _ in range(HALVINGS):
            middle = np.sqrt(low * high)
            less = self.counts(middle)[count] < wanted
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        return self.cost(np.sqrt(low * high))


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


def extrapolation(cells: pd.DataFrame, run: RunSize) -> dict[str, float]:
    """How many times the largest N, D and FLOPs among cells a run has; below 1 how many times the
    smallest; 1 inside their range."""
    asked = {"N": run.params_active_non_embedding, "D": run.tokens, "FLOPs": run.compute}
    factors = {}
    for axis, column in AXES.items():
        low, high = float(cells[column].min()), float(cells[column].max())
        factors[axis] = asked[axis] / float(np.clip(asked[axis], low, high))
    return factors
