"""What the model of the loss says of budgets: how to split one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from raysweep.scaling.compute.allocation import Allocation, compute_optimal
from raysweep.scaling.compute.isoflop import IsoFlop, isoflop, parabola_bias
from raysweep.scaling.loss.data import LossData, held_budgets
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_loss

PATH_BUDGETS, PATH_BEYOND = 7, 10.0
"""How many budgets a split is followed over, and how far beyond the largest."""
ROUTING = ("experts", "top_k", "granularity")


@dataclass(frozen=True, eq=False)
class Split:
    """How one architecture best splits the budget of its largest cell, by two methods.

    `optimum` is the model's at `flops`; its `params` are of the kind `count`. `path` does so at
    budgets from the smallest cell's to `PATH_BEYOND` times the largest's. `parabolas` is None
    unless budgets were held while sizes varied; `bias` is what the parabolas' exponent would be
    off on these very sizes if the model were the truth (NaN where that cannot be told).
    """

    law: str
    count: str
    flops: float
    optimum: Allocation | None
    path: tuple[Allocation, ...]
    parabolas: IsoFlop | None
    bias: float
    status: str
    message: str
    model: LossModel | None = None

    @property
    def ok(self) -> bool:
        return self.optimum is not None

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        parabolas = None
        if self.parabolas is not None:
            rest = {"exponent_bias": self.bias, "tokens_exponent": 1 - self.parabolas.exponent}
            parabolas = {**asdict(self.parabolas), **rest}
        return {
            "law": self.law,
            "count": self.count,
            "flops": self.flops,
            "optimum": None if self.optimum is None else asdict(self.optimum),
            "path": [asdict(a) for a in self.path],
            "parabolas": parabolas,
            "status": self.status,
            "message": self.message,
        }


def splitting(model: LossModel) -> LossModel:
    """The model, or, where its law reads compute alone, the best of those that can split a
    budget."""
    if model.law is None or {"params", "tokens"} <= set(model.law.inputs):
        return model
    other = [s.law for s in model.scores if s.law != model.law.key]
    return choose_loss(model.data, other) if other else model


def best_splits(
    model: LossModel, flops: Sequence[float], cells: pd.DataFrame, *, seed: int = 0
) -> list[Allocation]:
    """The best split of each budget for the architecture of `cells`, by the model that tells its
    loss. Where its cells differ in routing, that of the largest counts."""
    return compute_optimal(splitting(model), flops, given=routing_of(cells), seed=seed)


def split_budget(model: LossModel, cells: pd.DataFrame, n_boot: int = 200, seed: int = 0) -> Split:
    """The compute-optimal split of the largest budget of `cells`, and of others along the way."""
    able = splitting(model)
    nothing = Split("", able.count, math.nan, None, (), None, math.nan, able.status, able.why)
    own = LossData.from_cells(cells)
    if able.law is None or not len(own):
        return nothing
    flops, given = own.flops, routing_of(cells)
    budget = float(flops.max())
    budgets = [budget, *np.geomspace(flops.min(), PATH_BEYOND * budget, PATH_BUDGETS)]
    optimum, *path = compute_optimal(able, budgets, given=given, seed=seed)
    if not optimum.ok:
        return replace(
            nothing, law=able.law.key, status=optimum.status, message=optimum.why, model=able
        )
    parabolas, bias = None, math.nan
    if held_budgets(flops) is not None:
        inputs, _ = own.inputs(able.law)
        params, tokens = inputs["params"], inputs["tokens"]
        parabolas = isoflop(params, tokens, own.loss, flops, resamples=n_boot, seed=seed)
        bias = parabola_bias(able, params, tokens, flops).exponent_error
    return Split(
        law=able.law.key,
        count=able.count,
        flops=budget,
        optimum=optimum,
        path=tuple(a for a in path if a.ok),
        parabolas=parabolas if parabolas and math.isfinite(parabolas.exponent) else None,
        bias=bias,
        status=optimum.status,
        message="",
        model=able,
    )


def routing_of(cells: pd.DataFrame) -> dict[str, float]:
    """Experts, top-k and granularity of the largest cell, where they are known."""
    if not len(cells):
        return {}
    largest = cells.iloc[int(cells["flops"].to_numpy(float).argmax())]
    known = {name: float(largest[name]) for name in ROUTING if name in cells}
    return {name: value for name, value in known.items() if math.isfinite(value)}
