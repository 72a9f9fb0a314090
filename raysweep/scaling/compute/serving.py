"""The inference-aware optimum of Yun et al. 2024 (arXiv 2404.02852): quality against serving cost.

More experts lower the loss at a given training cost but fill the memory that a batch of requests
needs, so the loss-optimal model is rarely the one to serve. Under one training budget, a model
with many experts can be trained smaller and on more tokens than is loss-optimal, and still match
another's quality (or stay below its serving cost) at a profit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import ValidationError
from scipy.optimize import minimize_scalar, root_scalar

from raysweep.errors import UserError
from raysweep.scaling.compute.allocation import FARTHEST, OUTSIDE, least, ranges_of
from raysweep.scaling.compute.candidates import Candidate
from raysweep.scaling.compute.roofline import (
    BYTES,
    Gpu,
    Latency,
    Profile,
    Roofline,
    ServedModel,
    find_gpu,
)
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.loss.expression import Inputs
from raysweep.scaling.loss.laws import LOSS_LAWS, Law
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_loss
from raysweep.study.load import parse_yaml
from raysweep.study.serving import ServingSettings

Kind = Literal["loss-optimal", "same quality", "smaller, same quality", "bounded cost"]

KINDS: Mapping[Kind, str] = {
    "loss-optimal": "the lowest loss that the budget buys",
    "same quality": "loss-optimal on the FLOPs that reach the reference's loss",
    "smaller, same quality": "the whole budget on a smaller model, at the reference's loss",
    "bounded cost": "the lowest loss of the budget at no more than the reference's serving cost",
}

DEFAULT = ServingSettings()

SIZES, BUDGETS, DECADES_DOWN, DECADES_UP = 121, 141, 4, 5
"""Sizes that the loss-optimal one is looked for among; and budgets, so far below and above those
asked about, among which the one of a given loss is."""

SMALLER = 1e-4
"""How far below its loss-optimal size a model is looked for."""

SERVING_LAWS = ("wang", "yun", "joint_moe", "sparsity")
"""Laws that read parameters, tokens and experts."""


@dataclass(frozen=True)
class Serving:
    """The machines and the traffic: what a million generated tokens cost on.

    `latency` defaults to the GPU's roofline. A request reads `prompt` tokens and generates
    `generated`; sequences come and go, so they hold prompt + generated / 2 tokens on average. No
    more than `max_sequences` are served at once: without a bound weights would cost nothing, and
    experts be free."""

    gpu: Gpu
    dollars_per_hour: float  # of one GPU
    latency: Latency | None = None
    gpu_counts: tuple[int, ...] = DEFAULT.gpus
    prompt: float = DEFAULT.prompt
    generated: float = DEFAULT.generated
    usable_memory: float = 0.9  # the rest holds activations and the runtime
    max_sequences: float = DEFAULT.max_sequences

    def __post_init__(self) -> None:
        given = {
            "dollars_per_hour": self.dollars_per_hour,
            "prompt": self.prompt,
            "generated": self.generated,
            "max_sequences": self.max_sequences,
            "gpus": min(self.gpu_counts, default=0),
        }
        for name, value in given.items():
            if not value > 0:
                raise UserError(f"{name} must be a positive number, not {value:g}")

    @classmethod
    def of(cls, settings: ServingSettings, latency: Profile | None = None) -> Serving:
        """As a search-space file says; with a profile, on the numbers of GPUs it was measured
        on."""
        return cls(
            find_gpu(settings.gpu),
            settings.dollars,
            latency=latency,
            gpu_counts=latency.gpus if latency else settings.gpus,
            prompt=settings.prompt,
            generated=settings.generated,
            max_sequences=settings.max_sequences,
        )

    @property
    def timing(self) -> Latency:
        return self.latency or Roofline(self.gpu)


def settings_of(spaces: Mapping[str, str]) -> ServingSettings:
    """The `serving` section of the first search space that has one (texts by study); else the
    defaults."""
    for name, text in spaces.items():
        try:
            space, _ = parse_yaml(text, name)
        except UserError:  # an archived file that no longer reads
            continue
        if isinstance(space, dict) and isinstance(space.get("serving"), dict):
            try:
                return ServingSettings.model_validate(space["serving"])
            except ValidationError:
                continue
    return DEFAULT


@dataclass(frozen=True)
class ServingCost:
    """The cheapest number of GPUs to serve a model on; infinite dollars where none can hold it."""

    dollars_per_million: float
    gpus: int
    sequences: float  # served at once
    tokens_per_second: float  # of all GPUs together
    status: Literal["fits", "does not fit"]


@dataclass(frozen=True)
class Solution:
    """One way to spend a training budget and serve the result.

    `params` is the corresponding dense model. `size_share` is `params` over the loss-optimal size
    of the same architecture and budget; `training_share` the FLOPs over the budget. Against the
    reference's loss-optimal model of the budget stand `active_share`, its active parameters, and
    `cost_share`, its cost a token. `base_flops` are the training FLOPs that a loss-optimal model of
    the reference would need for this loss, and `saved` the share of them that is not spent (NaN
    where no budget looked at reaches it). `beyond` is how many times outside the fitted params,
    tokens or experts the model lies (1 inside)."""

    budget: float
    kind: Kind
    name: str
    trained: bool
    experts: float
    params: float
    params_total: float
    params_active: float
    tokens: float
    loss: float
    flops: float
    size_share: float
    training_share: float
    active_share: float
    cost_share: float
    base_flops: float
    saved: float
    beyond: float
    cost: ServingCost
    status: Literal["found", "unreachable"]
    message: str

    @property
    def outside(self) -> bool:
        """Whether it is the law's word alone: far from the cells, or of experts never trained."""
        return not self.trained or self.beyond > OUTSIDE


def serving_cost(model: ServedModel, serving: Serving) -> ServingCost:
    """min over G of G dollars / throughput, eq. 5 to 7 of the source.

    The batch fills what memory the weights leave, up to `max_sequences`; a step generates one token
    for each of its sequences, and admits sequences / generated new ones, whose prompts are read."""
    context = serving.prompt + 0.5 * serving.generated
    best = ServingCost(float("inf"), 0, 0.0, 0.0, "does not fit")
    weights = BYTES * (model.params_total + model.params_embedding)
    for gpus in serving.gpu_counts:
        room = gpus * serving.gpu.memory * serving.usable_memory - weights
        sequences = min(room / (model.kv_bytes * context), serving.max_sequences)
        if sequences < 1:
            continue
        step = serving.timing.prefill(
            model, gpus, sequences / serving.generated, serving.prompt
        ) + serving.timing.decode(model, gpus, sequences, context)
        rate = sequences / step
        dollars = gpus * serving.dollars_per_hour / 3600.0 / rate * 1e6
        if dollars < best.dollars_per_million:
            best = ServingCost(dollars, gpus, sequences, rate, "fits")
    return best


@dataclass(frozen=True)
class LossCurve:
    """The expected loss by a law of params, tokens and experts, and what it was fitted on."""

    law: Law
    count: str  # the column that the law takes as N
    predict: Callable[[Inputs], np.ndarray]
    ranges: Mapping[str, tuple[float, float]]
    coefficients: Mapping[str, Estimate] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LossModel, law: str | None = None) -> LossCurve:
        """By the law that answers; where that does not read what serving needs, by the best of
        those that do; by `law` where one is named.

        Raises UserError where no such law is determined."""
        model = _able(model, law).require()
        posterior, own = model.posterior, model.law
        assert posterior is not None
        assert own is not None
        return cls(
            own,
            model.count,
            lambda inputs: np.exp(posterior.mean(inputs)),
            ranges_of(model),
            model.coefficients,
        )


def _reads_experts(law: Law) -> bool:
    read = set(law.inputs)
    return {"params", "tokens"} <= read and bool({"experts", "sparsity"} & read)


def _able(model: LossModel, law: str | None) -> LossModel:
    if law is not None:
        if law in LOSS_LAWS and not _reads_experts(LOSS_LAWS[law]):
            raise UserError(
                f"law '{law}' does not read params, tokens and experts, as serving needs: "
                f"choose from {', '.join(SERVING_LAWS)}"
            )
        return choose_loss(model.data, [law])
    if model.law is not None and _reads_experts(model.law):
        return model
    return choose_loss(model.data, SERVING_LAWS) if model.ok else model


@dataclass(frozen=True)
class ServingLaw:
    """Loss and serving cost of every candidate, at any size and training budget.

    `reference` is the candidate that the others are held against. Raises UserError where there is
    none, or none of that name."""

    curve: LossCurve
    serving: Serving
    candidates: Mapping[str, CandidateCurves]
    reference: str

    @classmethod
    def of(
        cls,
        curve: LossCurve,
        serving: Serving,
        candidates: Sequence[Candidate],
        reference: str | float | None = None,
    ) -> ServingLaw:
        """`reference` is a name or a number of experts: by default the fewest of the mixtures."""
        if not candidates:
            raise UserError("there is no architecture to serve")
        for c in candidates:
            if not (math.isfinite(c.experts) and c.experts > 0):
                raise UserError(f"experts must be a positive number, not {c.experts:g}")
        each = {c.name: CandidateCurves(curve, c, serving) for c in candidates}
        return cls(curve, serving, each, _reference(candidates, reference))

    @property
    def base(self) -> CandidateCurves:
        return self.candidates[self.reference]

    def solutions(self, budgets: Sequence[float]) -> list[Solution]:
        """What each training budget, in FLOPs, can buy with each candidate: of every `Kind`, those
        that a candidate can have."""
        found = []
        for flops in budgets:
            if not (math.isfinite(flops) and flops > 0):
                raise UserError(f"flops must be a positive number, not {flops:g}")
            task = _Task(self.base, flops)
            for other in self.candidates.values():
                found += task.of(other)
        return found


def _reference(candidates: Sequence[Candidate], wanted: str | float | None) -> str:
    if wanted is None:
        mixtures = [c for c in candidates if c.experts > 1] or list(candidates)
        return min(mixtures, key=lambda c: c.experts).name
    for c in candidates:
        if wanted == c.name or str(wanted) == f"{c.experts:g}" or wanted == c.experts:
            return c.name
    known = ", ".join(f"{c.name} ({c.experts:g} experts)" for c in candidates)
    raise UserError(f"no architecture '{wanted}' to refer to; known: {known}")


@dataclass(frozen=True)
class CandidateCurves:
    """One candidate: its loss and its cost at any dense-equivalent size."""

    curve: LossCurve
    candidate: Candidate
    serving: Serving

    def model(self, params: float) -> ServedModel:
        return replace(self.candidate.model, params=params)

    def cost(self, params: float) -> ServingCost:
        return serving_cost(self.model(params), self.serving)

    def dollars(self, params: np.ndarray) -> np.ndarray:
        """Dollars a million generated tokens [n]; infinite where a model fits nowhere."""
        return np.array([self.cost(float(n)).dollars_per_million for n in params])

    def tokens(self, params: np.ndarray | float, flops: np.ndarray | float) -> np.ndarray | float:
        return flops / self.candidate.cost(_many(self.candidate.model, params).params_active)

    def losses(self, params: np.ndarray, flops: np.ndarray | float) -> np.ndarray:
        """Expected loss [n] of sizes trained on all the tokens that a budget buys."""
        return self.losses_at(params, np.asarray(self.tokens(params, flops)))

    def losses_at(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Expected loss [n] of sizes and tokens."""
        return self.curve.predict(self._inputs(params, tokens))

    def loss(self, params: float, flops: float) -> float:
        return float(self.losses(np.array([params]), flops)[0])

    def sizes(self, flops: float) -> np.ndarray:
        """The dense-equivalent sizes that are looked at for a budget."""
        low, high = self.curve.ranges.get("params", (1e6, 1e12))
        most = 6.0 * high * self.curve.ranges.get("tokens", (1.0, flops))[1]
        reach = max(abs(math.log(flops / most)), math.log(FARTHEST))
        return np.exp(np.linspace(math.log(low) - reach, math.log(high) + reach, SIZES))

    def optimal_params(self, flops: float) -> float:
        """The dense-equivalent size of the lowest loss at a training budget."""
        sizes = self.sizes(flops)
        lowest = int(np.clip(np.argmin(self.losses(sizes, flops)), 1, SIZES - 2))
        found = minimize_scalar(
            lambda x: self.loss(math.exp(x), flops),
            bounds=(math.log(sizes[lowest - 1]), math.log(sizes[lowest + 1])),
            options={"xatol": 1e-7},
        )
        return float(np.exp(found.x))

    @cached_property
    def _frontiers(self) -> dict[float, tuple[np.ndarray, np.ndarray]]:
        return {}

    def frontier(self, flops: float) -> tuple[np.ndarray, np.ndarray]:
        """(ln FLOPs [m], ln loss [m]) of loss-optimal models of budgets about one."""
        for centre, known in self._frontiers.items():
            if abs(math.log10(centre / flops)) < DECADES_DOWN - 2:
                return known
        around = np.logspace(-DECADES_DOWN, DECADES_UP, BUDGETS) * flops
        sizes = np.concatenate([self.sizes(float(around[0])), self.sizes(float(around[-1]))])
        grid = np.geomspace(sizes.min(), sizes.max(), 2 * SIZES)
        every = np.repeat(around, len(grid))
        loss = np.log(self.losses(np.tile(grid, len(around)), every).reshape(len(around), -1))
        found = np.log(around), np.minimum.accumulate(least(loss)[2])
        self._frontiers[flops] = found
        return found

    def flops_for(self, loss: float, about: float) -> float:
        """FLOPs of the loss-optimal model of a loss; NaN where none of the budgets reaches it."""
        log_flops, log_loss = self.frontier(about)
        wanted = math.log(loss)
        if not log_loss[-1] < wanted < log_loss[0]:
            return math.nan
        return math.exp(float(np.interp(-wanted, -log_loss, log_flops)))

    def _inputs(self, params: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray | float]:
        own = _many(self.candidate.model, params)
        counts = {
            "params_dense": own.params,
            "params_active_non_embedding": own.params_active,
            "params_total_non_embedding": own.params_total,
            "params_active": own.params_active + own.params_embedding,
            "params_total": own.params_total + own.params_embedding,
        }
        return {
            "params": np.asarray(counts[self.curve.count]),
            "tokens": tokens,
            "experts": own.experts,
            "top_k": own.used,
            "sparsity": 1 - own.used / own.experts,
            "granularity": own.granularity,
        }

    def beyond(self, params: float, tokens: float) -> float:
        """How many times outside the fitted params, tokens or experts a model lies."""
        factor = 1.0
        inputs = self._inputs(np.array([params]), np.array([tokens]))
        for name in ("params", "tokens", "experts"):
            value = float(np.asarray(inputs[name]).ravel()[0])
            low, high = self.curve.ranges.get(name, (value, value))
            factor = max(factor, low / value, value / high)
        return factor


class _Task:
    """One training budget: what the reference makes of it, and what another can."""

    def __init__(self, base: CandidateCurves, flops: float) -> None:
        self.base, self.flops = base, flops
        optimal = base.optimal_params(flops)
        self.loss = base.loss(optimal, flops)
        self.cost = base.cost(optimal)
        self.active = base.model(optimal).params_active

    def of(self, other: CandidateCurves) -> list[Solution]:
        """The solutions of a candidate, in the order of `Kind`."""
        optimal = other.optimal_params(self.flops)
        found = [self._solution(other, "loss-optimal", optimal, self.flops, optimal)]
        if other is self.base:
            return found
        return [
            *found,
            self._same_quality(other),
            self._smaller(other, optimal),
            self._bounded(other, optimal),
        ]

    def _same_quality(self, other: CandidateCurves) -> Solution:
        """The loss-optimal model of the least budget that reaches the reference's loss."""
        about = other.flops_for(self.loss, self.flops)
        if not math.isfinite(about):
            why = f"no budget of 10^-{DECADES_DOWN} to 10^{DECADES_UP} times this reaches that loss"
            return self._unreachable(other, "same quality", why)

        def excess(log_flops: float) -> float:
            flops = math.exp(log_flops)
            return math.log(other.loss(other.optimal_params(flops), flops) / self.loss)

        flops = about
        ends = math.log(about) - 0.1, math.log(about) + 0.1
        if excess(ends[0]) > 0 > excess(ends[1]):
            flops = math.exp(float(root_scalar(excess, bracket=ends, xtol=1e-9).root))
        params = other.optimal_params(flops)
        return self._solution(other, "same quality", params, flops, params)

    def _smaller(self, other: CandidateCurves, optimal: float) -> Solution:
        """Algorithm 1: N below the loss-optimal size, at the same training cost and the reference's
        loss."""
        kind: Kind = "smaller, same quality"
        if other.loss(optimal, self.flops) > self.loss:
            return self._unreachable(other, kind, "the budget does not reach that loss")

        def excess(log_params: float) -> float:
            return math.log(other.loss(math.exp(log_params), self.flops) / self.loss)

        ends = math.log(SMALLER * optimal), math.log(optimal)
        if excess(ends[0]) < 0:
            return self._unreachable(other, kind, "every smaller model is still better")
        params = math.exp(float(root_scalar(excess, bracket=ends, xtol=1e-10).root))
        return self._solution(other, kind, params, self.flops, optimal)

    def _bounded(self, other: CandidateCurves, optimal: float) -> Solution:
        """Algorithm 2: the best model that costs no more to serve than the reference. That is the
        loss-optimal one where it is cheap enough, else the largest below it that is."""
        kind: Kind = "bounded cost"
        if self.cost.status != "fits":
            return self._unreachable(other, kind, "the reference does not fit on these GPUs")
        bound = self.cost.dollars_per_million * (1 + 1e-9)
        sizes = np.geomspace(SMALLER * optimal, optimal, SIZES)
        cheap = np.flatnonzero(other.dollars(sizes) <= bound)
        if not len(cheap):
            return self._unreachable(other, kind, "no size is as cheap to serve")
        params = float(sizes[cheap[-1]])
        if cheap[-1] + 1 < SIZES:
            above = float(sizes[cheap[-1] + 1])
            while above / params > 1 + 1e-6:
                middle = math.sqrt(params * above)
                if other.cost(middle).dollars_per_million <= bound:
                    params = middle
                else:
                    above = middle
        return self._solution(other, kind, params, self.flops, optimal)

    def _solution(
        self, other: CandidateCurves, kind: Kind, params: float, flops: float, optimal: float
    ) -> Solution:
        model, cost = other.model(params), other.cost(params)
        loss, tokens = other.loss(params, flops), float(other.tokens(params, flops))
        base = flops
        if other is not self.base:
            same = kind in ("same quality", "smaller, same quality")
            base = self.flops if same else self.base.flops_for(loss, self.flops)
        fits = cost.status == self.cost.status == "fits"
        return Solution(
            budget=self.flops,
            kind=kind,
            name=other.candidate.name,
            trained=other.candidate.trained,
            experts=other.candidate.experts,
            params=params,
            params_total=model.params_total,
            params_active=model.params_active,
            tokens=tokens,
            loss=loss,
            flops=flops,
            size_share=params / optimal,
            training_share=flops / self.flops,
            active_share=model.params_active / self.active,
            cost_share=cost.dollars_per_million / self.cost.dollars_per_million
            if fits
            else math.nan,
            base_flops=base,
            saved=1 - flops / base,
            beyond=other.beyond(params, tokens),
            cost=cost,
            status="found",
            message="",
        )

    def _unreachable(self, other: CandidateCurves, kind: Kind, message: str) -> Solution:
        nan = math.nan
        numbers = (
            *("params", "params_total", "params_active", "tokens", "loss", "flops", "size_share"),
            *("training_share", "active_share", "cost_share", "base_flops", "saved", "beyond"),
        )
        return Solution(
            budget=self.flops,
            kind=kind,
            name=other.candidate.name,
            trained=other.candidate.trained,
            experts=other.candidate.experts,
            **dict.fromkeys(numbers, nan),
            cost=ServingCost(nan, 0, nan, nan, "does not fit"),
            status="unreachable",
            message=message,
        )


def _many(model: ServedModel, params: np.ndarray | float) -> ServedModel:
    """The model at many sizes at once: every count is then an array."""
    return replace(model, params=params)  # type: ignore[arg-type]
