"""Keys of the search-space file that say how trials are chosen, and how each is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

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
    """A budget of training FLOPs for all trials together. What `trials_per_cell` leaves of it goes,
    trial by trial, to the cell where it makes the recommendation for the targets surer at least
    cost; no cell gets more than four times `trials_per_cell`."""
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


class Recipe(Section):
    """How a model is trained, apart from learning rate and batch size."""

    optimizer: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    beta2_rule: Literal["fixed", "batch"] = "fixed"
    """`batch` keeps the averaging time of the second moment constant in tokens:
    beta2 ** (batch / reference), the reference being `beta2_reference_tokens`."""
    beta2_reference_tokens: Positive = 524288.0
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    """Decoupled: each step shrinks matrices by learning_rate * weight_decay. Not on embedding,
    routers and norm gains."""
    clip_norm: Positive | None = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.05
    """Linear warm-up over this share of the horizon's tokens, unless `warmup_tokens` is given."""
    warmup_tokens: Positive | None = None
    decay_fraction: Fraction = 0.2
    """Share of the horizon spent decaying, for `wsd`."""
    branches: bool = False
    """With `wsd` and several horizons: one trial trains the stable phase of the longest, and runs
    the decay of each shorter one from it. One trial gives a row in each cell of its scale."""
    final_lr_fraction: Fraction = 0.1
    """Final learning rate over peak, unless `final_lr` is given."""
    final_lr: NonNegative | None = None
    """A fixed final learning rate, the same for all peaks (never above the peak)."""
    z_loss: NonNegative = 0.0
    """Weight of the output z-loss, log^2 of the softmax normaliser."""
    init_std: Positive | None = None
    """Standard deviation of initial weights; default: 1/sqrt(fan-in), residual outputs scaled
    down by 1/sqrt(2 layers)."""
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
        return self

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
