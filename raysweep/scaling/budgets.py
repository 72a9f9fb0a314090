"""What the laws of the loss say of budgets: how to split one, and what experts save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.scaling.allocation import Allocation, compute_optimal
from raysweep.scaling.efficiency import Efficiency, data_efficiency, efficiency_leverage
from raysweep.scaling.group_loss import NotFitted, loss_inputs
from raysweep.scaling.groups import ALL, Group
from raysweep.scaling.holdout import LEVEL_RATIO, levels
from raysweep.scaling.isoflop import IsoFlop, isoflop, parabola_bias
from raysweep.scaling.loss_fit import LossFit

SPLIT_LAW = "chinchilla"
PATH_BUDGETS, PATH_BEYOND = 7, 10.0
"""How many budgets a split is followed over, and how far beyond the largest."""
SAVING_LAWS = ("wang", "yun", "joint_moe")
"""Laws of experts whose N is the active count, so that equal N is about equal FLOPs a token."""


@dataclass(frozen=True)
class Split:
    """How one architecture best splits the budget of its largest cell, by two methods.

    `optimum` minimises the law at `flops`; its `params` are of the kind `count`. `path` does so
    at budgets from the smallest cell's to `PATH_BEYOND` times the largest's. `parabolas` is None
    unless budgets were held while sizes varied; `bias` is what the parabolas' exponent would be
    off on these very sizes if the law were the truth (NaN where that cannot be told).
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
            "optimum": None
            if self.optimum is None
            else {**asdict(self.optimum), "tokens_exponent": 1 - self.optimum.exponent},
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


def split_budget(group: Group, n_boot: int, seed: int) -> Split:
    """The compute-optimal split of the largest cell's budget, by the group's Chinchilla law."""
    known = group.cells[group.cells["loss"].notna()]
    fit = group.loss_laws.get(SPLIT_LAW)
    if not isinstance(fit, LossFit) or not fit.ok:
        status, why = (fit.status, fit.message) if fit else ("no law", "not fitted")
        return Split(SPLIT_LAW, "", math.nan, None, (), None, math.nan, status, why)
    flops = known["flops"].to_numpy(float)
    params, tokens = (np.asarray(fit.inputs[name], dtype=float) for name in ("params", "tokens"))
    # FLOPs a token for each of the law's parameters: 6 on the average where N is what acts.
    per_parameter = float(np.exp(np.mean(np.log(flops / (params * tokens)))))
    budget = float(flops.max())

    def best(budget: float) -> Allocation:
        # At 6 FLOPs a token and parameter, where the split has a closed form, it is the same one.
        return replace(compute_optimal(fit, 6 / per_parameter * budget), flops=budget)

    optimum = best(budget)
    path = np.geomspace(flops.min(), PATH_BEYOND * budget, PATH_BUDGETS)
    parabolas, bias = None, math.nan
    if _held_budgets(flops):
        parabolas = isoflop(params, tokens, fit.loss, flops, resamples=n_boot, seed=seed)
        bias = parabola_bias(fit, params, tokens, flops).exponent_error
    return Split(
        law=SPLIT_LAW,
        count=loss_inputs(known, SPLIT_LAW)[1],
        flops=budget,
        optimum=optimum,
        path=tuple(best(float(c)) for c in path),
        parabolas=parabolas if parabolas and math.isfinite(parabolas.exponent) else None,
        bias=bias,
        status=optimum.status if fit.status == "converged" else fit.status,
        message="" if fit.status == "converged" else fit.message,
    )


def _held_budgets(flops: np.ndarray) -> bool:
    """Whether the runs lie at distinct budgets, rather than anywhere on the axis of compute."""
    level = levels(flops)
    spans = [np.ptp(np.log(flops[level == k])) for k in range(level.max() + 1)]
    return len(spans) > 1 and max(spans) < math.log(LEVEL_RATIO)


def experts_law(groups: Mapping[str, Group]) -> LossFit | NotFitted | None:
    """The law over all numbers of experts together that best predicts the largest scale; None
    where there is but one number."""
    everything = groups.get(ALL)
    if everything is None:
        return None
    best = [key for key in everything.loss_order() if key in SAVING_LAWS]
    return everything.loss_laws.get((*best, SAVING_LAWS[0])[0])


def savings(groups: Mapping[str, Group]) -> dict[str, Saving]:
    """By MoE architecture, what its experts save; empty without both dense and MoE cells."""
    fit = experts_law(groups)
    if fit is None or groups[ALL].kind != "mixed":
        return {}
    return {
        name: _saving(name, group.cells, fit)
        for name, group in groups.items()
        if name != ALL and group.kind == "moe"
    }


def _saving(name: str, cells: pd.DataFrame, fit: LossFit | NotFitted) -> Saving:
    known = cells[cells["loss"].notna()]
    if not isinstance(fit, LossFit) or not fit.ok or not len(known):
        status, why = (fit.status, fit.message) if not fit.ok else ("too few cells", "no loss")
        nan = math.nan
        return Saving(name, None, nan, nan, nan, None, None, status, f"{fit.name}: {why}")
    largest = known.iloc[-1]
    count = fit.law.parameter_count
    if not math.isfinite(largest.get(count, math.nan)):
        count = "params_active_non_embedding"
    params, tokens = float(largest[count]), float(largest["tokens"])
    given, dense = {"experts": float(largest["experts"])}, {"experts": 1.0}
    flops = 6 * params * tokens
    uncertain = "" if fit.status == "converged" else f"{fit.name}: {fit.message}"
    return Saving(
        architecture=name,
        law=fit.name,
        params=params,
        tokens=tokens,
        flops=flops,
        tokens_for_equal_loss=data_efficiency(fit, params, tokens, given, dense),
        compute_for_equal_loss=efficiency_leverage(fit, flops, given, dense),
        status=fit.status,
        message=uncertain,
    )


def usable_experts_law(groups: Mapping[str, Group]) -> LossFit:
    """`experts_law`, or a UserError that says why there is none."""
    fit = experts_law(groups)
    if isinstance(fit, LossFit) and fit.ok:
        return fit
    if fit is None:
        raise UserError(
            "these results know one number of experts only: serving weighs several, so search a "
            "dense and a MoE architecture, or MoEs of different sizes"
        )
    raise UserError(f"no law of experts can answer: {fit.name}: {fit.status}: {fit.message}")
