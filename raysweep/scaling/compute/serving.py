"""The inference-aware optimum of Yun et al. 2024 (arXiv 2404.02852): quality against serving cost.

More experts lower the loss at a given training cost but fill the memory that a batch of requests
needs, so the loss-optimal model is rarely the one to serve. Under one training budget, a model
with many experts can be trained smaller and on more tokens than is loss-optimal, and still match
another's quality (or its serving cost) at a profit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar, root_scalar

from raysweep.errors import UserError
from raysweep.scaling.compute.allocation import ranges_of
from raysweep.scaling.compute.roofline import BYTES, Gpu, Latency, Roofline, ServedModel
from raysweep.scaling.loss.expression import Inputs
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.laws import Law
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.plain import to_json

Kind = Literal["loss-optimal", "equal quality", "equal cost", "same quality, more compute"]

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""GPUs that may share one model."""

SMALLEST, LARGEST, SIZES = 1e3, 1e15, 121
"""Sizes that the loss-optimal one is looked for among."""

FAR_BEYOND = 10.0
"""Times outside the fitted range from which a row is marked."""


@dataclass(frozen=True)
class Serving:
    """The machines and the traffic: what a million generated tokens cost on.

    `latency` defaults to the GPU's roofline. A request reads `prompt` tokens and generates
    `generated`; sequences come and go, so they hold prompt + generated / 2 tokens on average."""

    gpu: Gpu
    dollars_per_hour: float  # of one GPU
    latency: Latency | None = None
    gpu_counts: tuple[int, ...] = GPU_COUNTS
    prompt: float = 1024.0
    generated: float = 256.0
    usable_memory: float = 0.9  # the rest holds activations and the runtime
    max_sequences: float = float("inf")
    model: ServedModel = field(default_factory=lambda: ServedModel(1e9))  # all but params, experts

    @property
    def timing(self) -> Latency:
        return self.latency or Roofline(self.gpu)


@dataclass(frozen=True)
class ServingCost:
    """The cheapest number of GPUs to serve a model on; infinite dollars where none can hold it."""

    dollars_per_million: float
    gpus: int
    sequences: float  # batch that fits
    tokens_per_second: float  # of all GPUs together
    status: Literal["fits", "does not fit"]


@dataclass(frozen=True)
class Solution:
    """One way to spend a training budget and serve the result.

    `params` is the corresponding dense model; `size_share` is `params` over the loss-optimal size
    of the same number of experts and budget, `training_share` the FLOPs over the budget, `beyond`
    how many times outside the fitted params, tokens or experts the model lies (1 inside)."""

    kind: Kind
    experts: float
    params: float
    params_total: float
    params_active: float
    tokens: float
    loss: float
    flops: float
    size_share: float
    training_share: float
    beyond: float
    cost: ServingCost
    status: Literal["found", "unreachable"]
    message: str


def serving_cost(model: ServedModel, serving: Serving) -> ServingCost:
    """min over G of G dollars / throughput, eq. 5 to 7 of the source.

    The batch fills what memory the weights leave; a step generates one token for each of its
    sequences, and admits sequences / generated new ones, whose prompts are read."""
    context = serving.prompt + 0.5 * serving.generated
    best = ServingCost(float("inf"), 0, 0.0, 0.0, "does not fit")
    for gpus in serving.gpu_counts:
        room = gpus * serving.gpu.memory * serving.usable_memory - BYTES * model.params_total
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
class _Curve:
    """The expected loss by a law of params, tokens and experts, and what it was fitted on."""

    law: Law
    count: str  # the column that the law takes as N
    predict: Callable[[Inputs], np.ndarray]
    ranges: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, fit: LossFit | LossModel) -> _Curve:
        """Raises UserError for a fit that may not be used."""
        if isinstance(fit, LossFit):
            if not fit.ok:
                raise UserError(
                    f"the fit of law '{fit.name}' is not usable ({fit.status}): {fit.message}"
                )
            return cls(fit.law, fit.law.parameter_count, fit.predict, fit.ranges())
        posterior, law = fit.require().posterior, fit.law
        assert posterior is not None
        assert law is not None
        return cls(law, fit.count, lambda inputs: np.exp(posterior.mean(inputs)), ranges_of(fit))


def serving_solutions(
    fit: LossFit | LossModel,
    flops: float,
    serving: Serving,
    experts: Sequence[float] = (2, 4, 8, 16, 32, 64),
    reference: float | None = None,
) -> list[Solution]:
    """What a training budget of `flops` can buy with each number of experts.

    For each: the loss-optimal split; the smaller, over-trained model of equal quality to the
    loss-optimal model of `reference` experts (by default the fewest), or, where the budget cannot
    reach that quality, the least compute that does; and the one of equal serving cost. `fit` is of
    a law that reads params, tokens and experts. Raises UserError for a fit that may not be used."""
    curve = _Curve.of(fit)
    read = set(curve.law.inputs)
    known = {"params", "tokens", "experts", "sparsity", "top_k"}
    if not {"params", "tokens"} <= read <= known or not {"experts", "sparsity"} & read:
        raise UserError(
            f"law '{curve.law.key}' does not read params, tokens and experts, as serving needs: it "
            f"reads {', '.join(curve.law.inputs)}"
        )
    positive = {
        "flops": flops,
        "dollars_per_hour": serving.dollars_per_hour,
        "prompt": serving.prompt,
        "generated": serving.generated,
        "top_k": serving.model.top_k,
        "the least number of experts": min((*experts, reference or np.inf), default=0.0),
    }
    for name, value in positive.items():
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} must be a positive number, not {value:g}")
    if not 0 < serving.model.moe_share <= 1:
        raise UserError(f"moe_share {serving.model.moe_share:g} must lie in (0, 1]")
    counts = sorted({float(e) for e in experts} | ({float(reference)} if reference else set()))
    studies = {e: _Budget(curve, flops, serving, e) for e in counts}
    target = studies[float(reference) if reference else counts[0]].best
    solutions = []
    for e in counts:
        study = studies[e]
        solutions.append(study.best)
        if study.best is not target:
            solutions.append(study.of_equal_quality(target))
            solutions.append(study.of_equal_cost(target))
    return solutions


class _Budget:
    """One number of experts under one training budget: every model size has its tokens."""

    def __init__(self, curve: _Curve, flops: float, serving: Serving, experts: float) -> None:
        self.curve = curve
        self.flops, self.serving, self.experts = flops, serving, experts
        best = self.optimal_params(flops)
        self.best = self._solution("loss-optimal", best, flops, best, "")

    def model(self, params: float) -> ServedModel:
        return replace(self.serving.model, params=params, experts=self.experts)

    def _law_params(self, params: float) -> float:
        """The law's N of a dense-equivalent size: the count that the law was fitted on."""
        unit = self.model(1.0)
        count = self.curve.count
        if count == "params_dense":
            return params
        return params * (unit.params_total if "total" in count else unit.params_active)

    def _losses(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The law's loss [n] of dense-equivalent sizes."""
        top_k = self.model(1.0).used
        given = {"experts": self.experts, "top_k": top_k, "sparsity": 1 - top_k / self.experts}
        return self.curve.predict(
            {**given, "params": self._law_params(1.0) * params, "tokens": tokens}
        )

    def loss(self, params: float, tokens: float) -> float:
        return float(self._losses(np.array([params]), np.array([tokens]))[0])

    def tokens(self, params: float, flops: float) -> float:
        return flops / (6.0 * self.model(params).params_active)

    def optimal_params(self, flops: float) -> float:
        """The dense-equivalent size of the lowest loss at a training budget."""
        active = self.model(1.0).params_active

        def loss(log_params: np.ndarray) -> np.ndarray:
            params = np.exp(log_params)
            return self._losses(params, flops / (6.0 * active * params))

        grid = np.linspace(np.log(SMALLEST), np.log(LARGEST), SIZES)
        lowest = int(np.clip(np.argmin(loss(grid)), 1, SIZES - 2))
        found = minimize_scalar(
            lambda x: float(loss(np.array([x]))[0]),
            bounds=(grid[lowest - 1], grid[lowest + 1]),
            options={"xatol": 1e-9},
        )
        return float(np.exp(found.x))

    def _solution(
        self, kind: Kind, params: float, flops: float, optimal: float, message: str
    ) -> Solution:
        model = self.model(params)
        tokens = self.tokens(params, flops)
        return Solution(
            kind=kind,
            experts=self.experts,
            params=params,
            params_total=model.params_total,
            params_active=model.params_active,
            tokens=tokens,
            loss=self.loss(params, tokens),
            flops=flops,
            size_share=params / optimal,
            training_share=flops / self.flops,
            beyond=self._beyond(params, tokens),
            cost=serving_cost(model, self.serving),
            status="found",
            message=message,
        )

    def of_equal_quality(self, target: Solution) -> Solution:
        """Solve N below the loss-optimal size for the target's loss, at the same training cost."""
        optimal = self.best.params
        if self.best.loss > target.loss:
            return self._with_more_compute(target)

        def excess(params: float) -> float:
            return self.loss(params, self.tokens(params, self.flops)) - target.loss

        params = _root(excess, optimal * 1e-4, optimal)
        if params is None:
            return self._unreachable("equal quality", "every smaller model is still better")
        words = f"{1 - params / optimal:.0%} smaller than loss-optimal, at the loss of "
        return self._solution(
            "equal quality", params, self.flops, optimal, words + f"{target.experts:g} experts"
        )

    def _with_more_compute(self, target: Solution) -> Solution:
        """The least training compute whose loss-optimal model reaches the target's loss."""

        def excess(flops: float) -> float:
            params = self.optimal_params(flops)
            return self.loss(params, self.tokens(params, flops)) - target.loss

        flops = _root(excess, self.flops, 1e4 * self.flops)
        if flops is None:
            return self._unreachable(
                "same quality, more compute", "not even 10,000 times the compute reaches that loss"
            )
        params = self.optimal_params(flops)
        return self._solution(
            "same quality, more compute",
            params,
            flops,
            params,
            f"needs {flops / self.flops:.2g} times the training compute",
        )

    def of_equal_cost(self, target: Solution) -> Solution:
        """Solve N for the target's dollars a token, at the same training cost."""
        if target.cost.status != "fits":
            return self._unreachable("equal cost", "the reference does not fit on these GPUs")

        def excess(params: float) -> float:
            price = serving_cost(self.model(params), self.serving).dollars_per_million
            # A model that fits nowhere has an infinite price, which no root finder likes.
            return min(float(np.log(price / target.cost.dollars_per_million)), 50.0)

        optimal = self.best.params
        params = _root(excess, optimal * 1e-4, optimal * 1e4)
        if params is None:
            return self._unreachable("equal cost", "no size costs the same to serve")
        gain = target.loss - self.loss(params, self.tokens(params, self.flops))
        words = f"loss {abs(gain):.3f} {'lower' if gain >= 0 else 'higher'} than "
        words += f"{target.experts:g} experts at the same price"
        if abs(excess(params)) > 0.01:
            words += ", or as near as the step in price between numbers of GPUs allows"
        return self._solution("equal cost", params, self.flops, optimal, words)

    def _unreachable(self, kind: Kind, message: str) -> Solution:
        nan = float("nan")
        numbers = ("params", "params_total", "params_active", "tokens", "loss", "flops")
        return Solution(
            kind=kind,
            experts=self.experts,
            **dict.fromkeys((*numbers, "size_share", "training_share", "beyond"), nan),
            cost=ServingCost(nan, 0, nan, nan, "does not fit"),
            status="unreachable",
            message=message,
        )

    def _beyond(self, params: float, tokens: float) -> float:
        factor = 1.0
        given = {"params": self._law_params(params), "tokens": tokens, "experts": self.experts}
        for name, value in given.items():
            low, high = self.curve.ranges.get(name, (value, value))
            factor = max(factor, low / value, value / high)
        return factor


def _root(excess: Callable[[float], float], low: float, high: float) -> float | None:
    """Where `excess` changes sign between low and high; None where it has the same sign at both."""

    def by_log(x: float) -> float:
        return excess(float(np.exp(x)))

    ends = np.log([low, high])
    if np.sign(by_log(ends[0])) == np.sign(by_log(ends[1])):
        return None
    return float(np.exp(root_scalar(by_log, bracket=tuple(ends), xtol=1e-10).root))


def serving_dict(
    solutions: Sequence[Solution], serving: Serving, flops: float
) -> dict[str, object]:
    """What `raysweep serving --json` prints: the assumptions, then the solutions."""
    gpu = serving.gpu
    found = to_json(
        {
            "flops": flops,
            "assume": {
                "gpu": asdict(gpu),
                "dollars_per_gpu_hour": serving.dollars_per_hour,
                "latency": _latency(serving),
                "prompt_tokens": serving.prompt,
                "generated_tokens": serving.generated,
                "usable_memory": serving.usable_memory,
                "top_k": serving.model.top_k,
                "moe_share": serving.model.moe_share,
            },
            "solutions": [asdict(s) for s in solutions],
        }
    )
    assert isinstance(found, dict)
    return found


def serving_text(solutions: Sequence[Solution], serving: Serving, flops: float) -> str:
    """A table, one row a solution; N is the corresponding dense model."""
    lines = [
        f"training budget {flops:.3g} FLOPs; served on {serving.gpu.name} at "
        f"${serving.dollars_per_hour:g} an hour each ({_latency(serving)}), "
        f"{serving.prompt:g} tokens read and {serving.generated:g} written a request, "
        f"top-{serving.model.top_k:g}",
        "",
        "experts  solution                        N   N/optimal  training     tokens     loss"
        "   $/1M tokens  GPUs",
    ]
    for s in solutions:
        if s.status != "found":
            lines.append(f"{s.experts:7g}  {s.kind:<26} {s.message}")
            continue
        price = f"{s.cost.dollars_per_million:.3g}" if s.cost.status == "fits" else "no room"
        mark = " !" if s.beyond >= FAR_BEYOND else ""
        lines.append(
            f"{s.experts:7g}  {s.kind:<26} {s.params:8.3g}  {s.size_share:9.2f}x  "
            f"{s.training_share:7.2f}x  {s.tokens:9.3g}  {s.loss:7.4f}  {price:>12}  "
            f"{s.cost.gpus:4d}{mark}"
        )
    beyond = max((s.beyond for s in solutions if s.status == "found"), default=math.nan)
    lines += ["", "N is the dense model that the experts are added to, embeddings aside."]
    if beyond >= FAR_BEYOND:
        lines.append(
            f"! lies {FAR_BEYOND:g} times or more outside what was fitted (at most "
            f"{beyond:.2g} times): a guess, not a measurement"
        )
    return "\n".join(lines)


def _latency(serving: Serving) -> str:
    if isinstance(serving.timing, Roofline):
        return "latency by its roofline, with assumed efficiencies"
    return "latency as profiled"
