"""What the model of the loss says of budgets: how to split one, and what experts save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.scaling.compute.allocation import Allocation, compute_optimal
from raysweep.scaling.compute.efficiency import (
    Efficiency,
    compute_for_equal_loss,
    tokens_for_equal_loss,
)
from raysweep.scaling.compute.isoflop import IsoFlop, isoflop, parabola_bias
from raysweep.scaling.estimate import NOT_DETERMINED
from raysweep.scaling.groups import ALL, Group
from raysweep.scaling.loss.data import COLUMNS, held_budgets
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import NotFitted, choose_loss

PATH_BUDGETS, PATH_BEYOND = 7, 10.0
"""How many budgets a split is followed over, and how far beyond the largest."""
ROUTING = ("experts", "top_k", "granularity")
SERVING_LAWS = ("wang", "yun", "joint_moe")
"""Laws of experts whose N follows from the dense model that experts are added to."""


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


@dataclass(frozen=True)
class Saving:
    """What an MoE architecture saves over a dense model, at the sizes of its largest cell.

    `tokens_for_equal_loss` compares at equal active parameters, `compute_for_equal_loss` (the
    efficiency leverage) with each budget split optimally; both are dense over MoE.
    """

    architecture: str
    law: str | None
    params: float
    tokens: float
    flops: float
    tokens_for_equal_loss: Efficiency | None
    compute_for_equal_loss: Efficiency | None
    status: str
    message: str

    @property
    def ok(self) -> bool:
        return self.tokens_for_equal_loss is not None

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return asdict(self)


def splitting(model: LossModel) -> LossModel:
    """The model, or, where its law reads compute alone, the best of those that can split a
    budget."""
    if model.law is None or {"params", "tokens"} <= set(model.law.inputs):
        return model
    other = [s.law for s in model.scores if s.law != model.law.key]
    return choose_loss(model.data, other) if other else model


def best_splits(model: LossModel, flops: Sequence[float], *, seed: int = 0) -> list[Allocation]:
    """The best split of each budget for the architecture whose cells a model was fitted to.

    Where its cells differ in routing, that of the largest counts."""
    able = splitting(model)
    return compute_optimal(able, flops, given=routing_of(able), seed=seed)


def split_budget(model: LossModel, n_boot: int, seed: int) -> Split:
    """The compute-optimal split of the largest cell's budget, and of others along the way."""
    able = splitting(model)
    nothing = Split("", able.count, math.nan, None, (), None, math.nan, able.status, able.why)
    if able.law is None or not len(able.data):
        return nothing
    flops, given = able.data.flops, routing_of(able)
    budget = float(flops.max())
    budgets = [budget, *np.geomspace(flops.min(), PATH_BEYOND * budget, PATH_BUDGETS)]
    optimum, *path = compute_optimal(able, budgets, given=given, seed=seed)
    if not optimum.ok:
        return Split(
            able.law.key,
            able.count,
            math.nan,
            None,
            (),
            None,
            math.nan,
            optimum.status,
            optimum.why,
        )
    parabolas, bias = None, math.nan
    if held_budgets(flops) is not None:
        inputs, _ = able.data.inputs(able.law)
        params, tokens = inputs["params"], inputs["tokens"]
        parabolas = isoflop(params, tokens, able.data.loss, flops, resamples=n_boot, seed=seed)
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


def routing_of(model: LossModel) -> dict[str, float]:
    """Experts, top-k and granularity of the largest cell, where they are known."""
    columns = model.data.columns
    largest = int(np.argmax(model.data.flops)) if len(model.data) else 0
    return {
        name: float(columns[name][largest])
        for name in ROUTING
        if len(columns[name]) and math.isfinite(columns[name][largest])
    }


def savings(groups: Mapping[str, Group], models: Mapping[str, LossModel]) -> dict[str, Saving]:
    """By MoE architecture, what its experts save; empty without both dense and MoE cells."""
    if ALL not in groups or groups[ALL].kind != "mixed":
        return {}
    return {
        name: _saving(name, group.cells, models[ALL])
        for name, group in groups.items()
        if name != ALL and group.kind == "moe"
    }


def _saving(name: str, cells: pd.DataFrame, model: LossModel) -> Saving:
    known = cells[cells["loss"].notna()]
    able = splitting(model)
    if able.law is None or not len(known):
        why = able.why or "no loss"
        nan = math.nan
        return Saving(name, None, nan, nan, nan, None, None, NOT_DETERMINED, why)
    largest = known.iloc[-1]
    run = {
        c: np.array([float(largest[c])]) for c in COLUMNS if c in largest and c != "batch_tokens"
    }
    dense = {**run, **{c: np.ones(1) for c in ("experts", "top_k", "granularity")}}
    active = run["params_active_non_embedding"]
    dense |= {"params_total_non_embedding": active, "params_dense": active}
    if "params_active" in run:
        dense["params_total"] = run["params_active"]
    own, other = (
        {c: float(d[c][0]) for c in ("experts", "top_k", "granularity") if c in d}
        for d in (run, dense)
    )
    flops = float(largest["flops"])
    return Saving(
        architecture=name,
        law=able.law.key,
        params=float(active[0]),
        tokens=float(largest["tokens"]),
        flops=flops,
        tokens_for_equal_loss=tokens_for_equal_loss(able, run, dense),
        compute_for_equal_loss=compute_for_equal_loss(able, flops, own, other),
        status=able.status,
        message="",
    )


def usable_experts_law(groups: Mapping[str, Group]) -> LossFit:
    """The law over all numbers of experts together that best predicts the highest level of compute,
    or a UserError that says why there is none."""
    if ALL not in groups:
        raise UserError(
            "these results know one number of experts only: serving weighs several, so search a "
            "dense and a MoE architecture, or MoEs of different sizes"
        )
    everything = groups[ALL]
    best = [key for key in everything.loss_order() if key in SERVING_LAWS]
    fit = everything.loss_laws.get((*best, SERVING_LAWS[0])[0])
    if isinstance(fit, LossFit) and fit.ok:
        return fit
    assert fit is None or isinstance(fit, LossFit | NotFitted)
    why = f"{fit.name}: {fit.status}: {fit.message}" if fit else "none was fitted"
    raise UserError(f"no law of experts can answer: {why}")
