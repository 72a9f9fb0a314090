"""Keys of the search-space file that say how trials are chosen, and how each is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raysweep.study.fields import Count, Fraction, NonNegative, Positive, Section


class LearningRateRange(Section):
    """Peak learning rate, searched log-uniformly from low to high."""

    low: Positive = 1e-4
    high: Positive = 1e-1
    hard_low: Positive = 1e-6
    hard_high: Positive = 3.0
    """A range whose optimum lies at its edge is extended, never beyond the hard limits."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"learning_rate low {self.low:g} must be below high {self.high:g}")
        if not (self.hard_low <= self.low and self.high <= self.hard_high):
            raise ValueError("learning_rate low..high must lie within hard_low..hard_high")
        return self


class BatchRange(Section):
    """Global batch in sequences, searched over powers of two from low to high."""

    low: Count = 4
    high: Count = 256
    hard_low: Count = 1
    hard_high: Count = 65536

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("low", "high", "hard_low", "hard_high"):
            value = getattr(self, key)
            if value & (value - 1):
                near = 2 ** round(math.log2(value))
                raise ValueError(f"batch_sequences {key} {value} is no power of two: use {near}")
        if not self.low <= self.high:
            raise ValueError(f"batch_sequences low {self.low} must not exceed high {self.high}")
        if not (self.hard_low <= self.low and self.high <= self.hard_high):
            raise ValueError("batch_sequences low..high must lie within hard_low..hard_high")
        return self


class AlsoRange(Section):
    """A further hyperparameter, searched beside learning rate and batch."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    log: bool = True
    """Whether it is searched, and its parabola lies, in its logarithm."""

    @property
    def middle(self) -> float:
        """The middle of the range: geometric where it is searched in logs."""
        if self.log:
            return math.sqrt(self.low * self.high)
        return 0.5 * (self.low + self.high)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} has no logarithm: raise it, or set log: false")
        return self


class EarlyStopping(Section):
    """Stopping poor trials on partial losses. Off by default: schedules that decay make early
    losses misleading, so it favours high early progress (small batches, large learning rates)."""

    method: Literal["asha", "median"]
    grace_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the horizon before any trial may be stopped."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0


class Search(Section):
    """What is searched, how, and how much of it."""

    strategy: Literal["ladder", "tpe", "gp", "qmc", "random", "grid", "cmaes"] = "ladder"
    learning_rate: LearningRateRange = LearningRateRange()
    batch_sequences: BatchRange = BatchRange()
    also: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,40}$")], AlsoRange] = Field(default={})
    """Further hyperparameters: keys of `recipe`, or with your own training any names. Each is
    taken to have a parabola that all cells share, whose lowest point may move with size."""
    trials_per_cell: Annotated[int, Field(ge=1, le=100_000)] = 6
    first_cell_trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Trials of each architecture's smallest cell, which teaches the others; default: as others."""
    total_flops: Positive | None = None
    """A budget of training FLOPs for all trials together. What `trials_per_cell` leaves of it is
    planned anew with each trial: it goes to the cells where it makes the recommendation for the
    targets surer at least cost, or to all alike where no plan promises much more; no cell gets more
    than four times `trials_per_cell`."""
    repeats_at_optimum: Annotated[int, Field(ge=0, le=1000)] = 0
    """Extra seeds at each cell's best trial, to measure the noise of the loss."""
    extend_edges: bool = True
    """Widen the range of a cell whose optimum lies at an edge of it."""
    max_extensions: Annotated[int, Field(ge=0, le=100)] = 2
    """How often the range of one cell may be widened, each time by a factor of four."""
    early_stopping: EarlyStopping | None = None
    stall_seconds: NonNegative = 600.0
    """A worker silent for this long, and for 20 times the longest silence of its cell so far,
    hangs: it is killed, and its trial goes on in another. Six times as long before the first sign
    of life. 0 is never."""


Role = Literal["embedding", "head", "matrices", "router", "norms"]
"""What a parameter is for: `matrices` are those of attention, feed-forwards and experts."""


class GroupRates(Section):
    """Learning rates as fixed ratios to the one that is searched."""

    embedding: Positive = 1.0
    head: Positive = 1.0
    matrices: Positive = 1.0
    router: Positive = 1.0
    norms: Positive = 1.0


class Recipe(Section):
    """How a model is trained, apart from learning rate and batch size."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` trains matrices by orthogonalised momentum (Jordan et al. 2024), a step's size being
    that of AdamW's at the same rate (Moonlight, arXiv 2502.16982); AdamW trains the rest."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of Muon (Nesterov's)."""
    group_rates: GroupRates = GroupRates()
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    beta2_rule: Literal["fixed", "batch"] = "fixed"
    """`batch` keeps the averaging time of the second moment constant in tokens:
    beta2 ** (batch / reference), the reference being `beta2_reference_tokens`."""
    beta2_reference_tokens: Positive = 524288.0
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    """Decoupled, by `weight_decay_rule`."""
    weight_decay_rule: Literal["fixed", "independent", "timescale"] = "fixed"
    """What a step shrinks weights by. `fixed`: learning_rate * weight_decay, as PyTorch does.
    `independent`: weight_decay times the schedule, whatever the peak (Loshchilov & Hutter 2019;
    Wortsman et al., arXiv 2309.14322, take 1e-4). `timescale`: batch / (tau * horizon) at the peak,
    so that tau = batch / (learning_rate * weight_decay * horizon), the share of a run that weights
    average over, is the same in all trials (Wang & Aitchison, arXiv 2405.13698)."""
    weight_decay_timescale: Positive = 0.2
    """Tau of `weight_decay_rule: timescale`. Power Lines (arXiv 2505.13738) finds its optimum at
    1.084 (D/N)^-0.527: 0.22 at 20 tokens a parameter."""
    weight_decay_on: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None
    """What decays. Default: matrices and head with `weight_decay_rule: fixed`, else matrices."""
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    """How initial weights and learning rates follow width and depth, so that one searched rate
    suits all: `mup` in width (Yang et al., arXiv 2203.03466), `completep` in depth as well (Dey et
    al., arXiv 2505.01618). At the base shape both are `standard`."""
    base_d_model: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Width of the base shape; needed with `mup` and `completep`."""
    base_layers: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Depth of the base shape; needed with `completep`."""
    clip_norm: Positive | None = 1.0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: a half cosine or a line down to the final rate; constant, with a decay
    over the last `decay_fraction` (WSD); or constant."""
    warmup_fraction: Fraction = 0.05
    """Linear warm-up over this share of the horizon's tokens, unless `warmup_tokens` is given."""
    warmup_tokens: Positive | None = None
    decay_fraction: Fraction = 0.2
    """Share of the horizon spent decaying, for `wsd`."""
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    """Of the decay of `wsd`; `1-sqrt` falls faster at first (Hägele et al., arXiv 2405.18392)."""
    branches: bool = False
    """With `wsd` and several horizons: one trial trains the stable phase of the longest, and runs
    the decay of each shorter one from it. One trial gives a row in each cell of its scale."""
    final_lr_fraction: Fraction = 0.1
    """Final learning rate over peak, unless `final_lr` is given; 0 decays to zero."""
    final_lr: NonNegative | None = None
    """A fixed final learning rate, the same for all peaks (never above the peak)."""
    z_loss: NonNegative = 0.0
    """Weight of the output z-loss, log^2 of the softmax normaliser."""
    init_std: Positive | None = None
    """Standard deviation of initial weights; default: 1/sqrt(fan-in), residual outputs scaled
    down by 1/sqrt(2 layers)."""
    ema_tokens: Positive | None = None
    """Tokens over which weights are averaged (an exponential moving average, corrected for its
    start); the loss of the averaged weights is measured besides, as `loss_ema`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and products; weights are kept in float32. `auto` is bfloat16 on GPUs that
    have it, and float32 on others and on CPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles on GPUs only."""
    noise_scale: bool = True
    """Measure the gradient noise scale while training."""
    checkpoint_seconds: NonNegative = 600.0
    """Seconds between checkpoints of a running trial; 0 switches them off."""

    def with_values(self, values: Mapping[str, float]) -> Self:
        """The recipe with some of its numbers set anew. Raises ValueError for what is no number of
        it, or out of its range."""
        for name in values:
            known = self.model_dump().get(name)
            if isinstance(known, bool) or not isinstance(known, int | float):
                numbers = [k for k, v in self.model_dump().items() if type(v) in (int, float)]
                raise ValueError(f"{name} is no number of recipe: {', '.join(numbers)}")
        return type(self).model_validate(self.model_dump() | dict(values))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.branches and self.schedule != "wsd":
            raise ValueError(f"branches need schedule: wsd, not {self.schedule}")
        if self.branches and self.warmup_tokens is None:
            raise ValueError("branches need warmup_tokens: a share of the horizon is not shared")
        if self.branches and self.weight_decay_rule == "timescale":
            raise ValueError(
                "branches share steps, and weight_decay_rule timescale differs by horizon: set it "
                "to fixed or independent"
            )
        if self.weight_decay_rule == "independent" and self.weight_decay > 0.01:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} with weight_decay_rule independent would "
                "shrink weights by that share a step: set it to 1e-4 or so"
            )
        if self.decay_shape != "linear" and self.schedule != "wsd":
            raise ValueError(f"decay_shape is of schedule: wsd, not {self.schedule}: drop it")
        if self.parametrization != "standard" and self.base_d_model is None:
            raise ValueError(f"parametrization {self.parametrization} needs base_d_model")
        if self.parametrization == "completep" and self.base_layers is None:
            raise ValueError("parametrization completep needs base_layers")
        return self

    @property
    def decays_on(self) -> tuple[Role, ...]:
        """The parameters that weight decay applies to."""
        if self.weight_decay_on is not None:
            return self.weight_decay_on
        return ("matrices", "head") if self.weight_decay_rule == "fixed" else ("matrices",)

    def record(self) -> dict[str, Any]:
        """Plain values of all keys; of those that are younger than the first rows, such as differ
        from the default: so what rows and their keys say of a recipe stays as it was."""
        found = self.model_dump(mode="json")
        for name in YOUNGER:
            if getattr(self, name) == type(self).model_fields[name].default:
                del found[name]
        return found

    def warmup(self, horizon: float) -> float:
        """Tokens of warm-up in a run of that many."""
        if self.warmup_tokens is not None:
            return self.warmup_tokens
        return self.warmup_fraction * horizon

    def decay_start(self, horizon: float) -> float:
        """Tokens after which the learning rate falls in a run of that many."""
        if self.schedule == "constant":
            return horizon
        if self.schedule == "wsd":
            return max(self.warmup(horizon), (1 - self.decay_fraction) * horizon)
        return self.warmup(horizon)


YOUNGER = (
    "momentum",
    "group_rates",
    "weight_decay_rule",
    "weight_decay_timescale",
    "weight_decay_on",
    "parametrization",
    "base_d_model",
    "base_layers",
    "decay_shape",
    "ema_tokens",
)
"""Keys of a recipe that came after the first rows had been written."""
