"""What the model of the loss says of budgets: how to split one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from raysweep.scaling.compute.allocation import (
    COUNT_NAMES,
    Allocation,
    Count,
    best_size,
    compute_optimal,
)
from raysweep.scaling.compute.isoflop import IsoFlop, isoflop, power_law
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.loss.data import LossData, held_budgets
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_law, choose_loss
from raysweep.scaling.runs import RunMaker

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
            parabolas = {**asdict(self.parabolas), "exponent_bias": self.bias}
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
    able, given = splitting(model), routing_of(cells)
    return compute_optimal(
        able, flops, given=given, flops_per_token=cost_of(able, cells), seed=seed
    )


def cost_of(model: LossModel, cells: pd.DataFrame) -> Count:
    """FLOPs a token against the N of a model's law, for the architecture of `cells`."""
    routing = routing_of(cells)
    experts, top_k = (int(routing.get(name, 1)) for name in ("experts", "top_k"))
    maker = RunMaker.after(cells, experts=experts, top_k=top_k)
    return lambda params: maker.flops_per_token(model.count, params)


def split_budget(model: LossModel, cells: pd.DataFrame, n_boot: int = 200, seed: int = 0) -> Split:
    """The compute-optimal split of the largest budget of `cells`, and of others along the way."""
    able = splitting(model)
    nothing = Split("", able.count, math.nan, None, (), None, math.nan, able.status, able.why)
    own = LossData.from_cells(cells)
    if able.law is None or not len(own):
        return nothing
    flops = own.flops
    budget = float(flops.max())
    budgets = [budget, *np.geomspace(flops.min(), PATH_BEYOND * budget, PATH_BUDGETS)]
    optimum, *path = best_splits(able, budgets, cells, seed=seed)
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


@dataclass(frozen=True)
class ParabolaBias:
    """What the parabolas would report on noise-free losses of a known law, on the same grid."""

    params_ratio: np.ndarray  # a budget's parabola N_opt over the law's own, NaN without a minimum
    exponent_error: float  # parabola exponent - the law's own


def parabola_bias(
    model: LossModel, params: np.ndarray, tokens: np.ndarray, flops: np.ndarray | None = None
) -> ParabolaBias:
    """The parabolas' error on this grid if a model of the loss were the truth.

    FLOPs a token are proportional to N, as on the grid on average."""
    expected = model.predict_mean({"params": params, "tokens": tokens})[0]
    truth = isoflop(params, tokens, expected, flops)
    spent = 6.0 * params * tokens if flops is None else flops
    cost = float(np.exp(np.mean(np.log(spent / (params * tokens)))))  # FLOPs = cost N D here
    budgets = np.array([p.flops for p in truth.parabolas])
    best = np.array([best_size(model, c, flops_per_token=lambda n: cost * n) for c in budgets])
    ratio = np.array([p.params for p in truth.parabolas]) / best
    told = len(best) > 1 and np.isfinite(best).all()
    slope = power_law(budgets, best)[0] if told else np.nan
    return ParabolaBias(ratio, truth.exponent - slope)


def routing_of(cells: pd.DataFrame) -> dict[str, float]:
    """Experts, top-k and granularity of the largest cell, where they are known."""
    if not len(cells):
        return {}
    largest = cells.iloc[int(cells["flops"].to_numpy(float).argmax())]
    known = {name: float(largest[name]) for name in ROUTING if name in cells}
    return {name: value for name, value in known.items() if math.isfinite(value)}


# ---------------------------------------------------------------------- exponents of one count

SOURCE_EXPONENTS = {"dense": (0.507, 0.493), "moe": (0.590, 0.410)}
"""N_opt ~ C^a, D_opt ~ C^b in Wang et al. 2024 (arXiv 2410.05661), by IsoFLOP profiles."""

COUNT = "params_active_non_embedding"
"""The count of parameters that exponents are told in: that of the source. In another the same
losses give other exponents (.420 and .565 for the source's, in all parameters with a vocabulary of
32k), so none but these are set side by side."""


@dataclass(frozen=True)
class Exponents:
    """How the best N (of `count`) and D of a budget grow with it, by one method.

    `method` is `law` (Chinchilla's, fitted to the architecture's own cells), `parabolas` (through
    the runs of each held budget), or `source` (Wang et al.)."""

    architecture: str
    method: str
    params: Estimate
    tokens: Estimate
    note: str = ""
    count: str = COUNT


def allocation_exponents(
    architecture: str, kind: str, cells: pd.DataFrame, n_boot: int = 200
) -> list[Exponents]:
    """The exponents of one architecture by its own cells alone, and the source's beside them."""
    data = LossData.from_cells(cells)
    found = [_by_law(architecture, data, cells)]
    if len(data) and held_budgets(data.flops) is not None:
        found.append(_by_parabolas(architecture, data, n_boot))
    params, tokens = SOURCE_EXPONENTS[kind]
    return [
        *found,
        Exponents(architecture, "source", Estimate(params), Estimate(tokens), "Wang et al."),
    ]


def _by_law(architecture: str, data: LossData, cells: pd.DataFrame) -> Exponents:
    law = replace(LOSS_LAWS["chinchilla"], parameter_count=COUNT)
    model = choose_law(data, law)
    if not model.ok:
        missing = Estimate.missing(model.why)
        return Exponents(architecture, "law", missing, missing)
    budget = float(np.exp(np.log(data.flops).mean()))
    (best,) = best_splits(model, [budget], cells)
    names = ("exponent", "tokens_exponent")
    params, tokens = (best.estimate(name) for name in names)
    return Exponents(architecture, "law", params, tokens)


def _by_parabolas(architecture: str, data: LossData, n_boot: int) -> Exponents:
    own = data.averaged()
    columns = (own.columns[COUNT], own.columns["tokens"], own.loss, own.flops)
    fitted = isoflop(*columns, resamples=n_boot)
    note = (
        f"{len(fitted.inside)} of {len(fitted.parabolas)} budgets have a minimum inside their sizes"
    )
    if not math.isfinite(fitted.exponent):
        missing = Estimate.missing(note)
        return Exponents(architecture, "parabolas", missing, missing, note)
    low, high = fitted.interval or (math.nan, math.nan)
    tokens = fitted.tokens_exponent
    off = tokens + fitted.exponent
    return Exponents(
        architecture,
        "parabolas",
        Estimate(fitted.exponent, low, high),
        Estimate(tokens, off - high, off - low),
        note,
    )


def exponents_text(found: Sequence[Exponents]) -> list[str]:
    """The exponents as lines for a terminal; none where only the source's are known."""
    if not any(e.params.known for e in found if e.method != "source"):
        return []
    title = "Best split of a budget, by each architecture's own cells"
    lines = ["", f"{title} (N: {COUNT_NAMES[COUNT]})"]
    for e in found:
        said = e.params.why
        if e.params.known:
            said = f"N ~ C^{_said(e.params)}, D ~ C^{_said(e.tokens)}"
        said += f"; {e.note}" if e.note else ""
        lines.append(f"  {e.architecture:<12} {e.method:<10} {said}")
    return lines


def _said(e: Estimate) -> str:
    ends = f" ({e.low:.3f} to {e.high:.3f})" if e.has_interval else ""
    return f"{e.value:.3f}{ends}"
