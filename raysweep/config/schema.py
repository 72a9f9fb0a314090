"""The search-space file as typed, validated objects: every key, its meaning, its default."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Names become folder names: no separators, no leading dot."""


def _whole(value: Any) -> Any:
    """Accept 20e6 and '1e9' where a whole number is meant (YAML reads the latter as text)."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


MOST_LAYERS = 2_000
MOST_TOKEN_IDS = 10_000_000

Name = Annotated[str, Field(pattern=NAME)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**18)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**18)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the file. Unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Architecture(Section):
    """Dense, or a mixture of experts laid over the dense shape of each scale."""

    experts: Annotated[int, Field(ge=1, le=65536)] = 1
    """Routed experts a MoE layer; 1 means dense."""
    top_k: Count = 1
    """Experts that each token is sent to."""
    shared_experts: Annotated[int, Field(ge=0, le=1024)] = 0
    """Experts that every token passes through besides."""
    expert_size: Literal["matched"] | Ratio = "matched"
    """Width of an expert as a multiple of the dense feed-forward; `matched` makes the active
    experts together as wide as it, so that active parameters equal the dense twin's."""
    moe_every: Count = 1
    """Every how-manieth layer is a MoE layer, counted so that the last one is."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How expert load is balanced: an auxiliary loss, a router bias without loss, or not at all."""
    balance_loss: NonNegative = 0.01
    """Weight of the load-balance loss (Switch Transformer's), when `balance: loss`."""
    router_z_loss: NonNegative = 0.001
    """Weight of the router z-loss (ST-MoE)."""

    @property
    def kind(self) -> Literal["dense", "moe"]:
        return "moe" if self.experts > 1 else "dense"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}: lower top_k")
        if self.experts == 1 and self.shared_experts:
            raise ValueError("shared_experts without experts: set experts above 1, or drop it")
        return self


class Resources(Section):
    """What one trial occupies."""

    workers: Annotated[int, Field(ge=1, le=65536)] = 1
    """Processes that train one model together. One worker trains inside a reused Tune actor."""
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    """May be a fraction with one worker: several small trials then share a card."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How parameters are spread over workers: replicated, or sharded (FSDP2)."""
    micro_batch_sequences: Annotated[int, Field(ge=1)] | None = None
    """Largest batch one worker holds at once; derived from memory if left out. Never changes the
    result, only speed."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers & (self.workers - 1):
            raise ValueError(
                f"workers {self.workers} is no power of two, as batches are: change it"
            )
        if self.workers > 1 and self.gpus_per_worker % 1:
            raise ValueError("a fraction of a GPU means one worker: set workers: 1")
        return self


class ScaleEntry(Section):
    """One rung: an explicit shape (d_model, layers, heads) or a `params` target."""

    name: Name | None = None
    params: Annotated[float, Field(ge=1, le=1e13)] | None = None
    """Dense non-embedding parameters aimed at: the shape is derived, its true count reported."""
    d_model: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    heads: Annotated[int, Field(ge=1, le=100_000)] | None = None
    kv_heads: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fewer key-value heads than heads is grouped-query attention; default: as many."""
    d_ff: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    architectures: tuple[Name, ...] | None = None
    """Architectures built at this scale; default: all."""
    resources: Resources | None = None
    """Resources of this scale's trials; default: the file's `resources`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        shape = (self.d_model, self.layers, self.heads)
        if self.params is not None and any(v is not None for v in (*shape, self.d_ff)):
            raise ValueError("give either params or a shape (d_model, layers, heads), not both")
        if self.params is None and any(v is None for v in shape):
            raise ValueError("a scale needs either params, or d_model, layers and heads")
        return self


class Horizon(Section):
    """A token budget: per parameter of the scale's dense twin (non-embedding), or absolute."""

    tokens_per_param: Positive | None = None
    tokens: Positive | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.tokens_per_param is None) == (self.tokens is None):
            raise ValueError("a horizon is either tokens_per_param or tokens")
        return self


class ModelSettings(Section):
    """What all shapes share."""

    sequence_length: Annotated[int, Field(ge=2, le=1_048_576)] = 1024
    head_dim: Annotated[int, Field(ge=2, le=1024)] = 64
    """Head size of derived shapes."""
    aspect_ratio: Ratio = 64.0
    """d_model / layers aimed at by derived shapes."""
    ffn_ratio: Ratio = 8 / 3
    """Feed-forward width over d_model, where a scale gives no d_ff."""
    ffn_multiple: Annotated[int, Field(ge=1, le=4096)] = 8
    """Feed-forward and expert widths are multiples of this."""
    qk_norm: bool = True
    tie_embeddings: bool = False
    rope_base: Positive = 10_000.0


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
    """Decoupled: each step shrinks matrices by learning_rate * weight_decay. Not on norm gains."""
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
    """`auto` is bfloat16 autocast on GPUs and float32 on CPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles on GPUs only."""
    noise_scale: bool = True
    """Measure the gradient noise scale while training."""
    checkpoint_seconds: NonNegative = 600.0
    """Seconds between checkpoints of a running trial; 0 switches them off."""

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


class Tokenizer(Section):
    """A byte-pair tokenizer trained on the corpus, or one loaded from a tokenizers file."""

    train_vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.train_vocab_size is None) == (self.file is None):
            raise ValueError("a tokenizer is either file or train_vocab_size")
        return self


class Data(Section):
    """What is trained on."""

    source: Literal["machine", "text", "jsonl", "parquet", "tokens"] = "machine"
    """`machine`: the Python sources and documentation installed here. The others read `paths`."""
    paths: tuple[str, ...] = ()
    """Files or folders; a relative path is taken from the search-space file's folder."""
    text_column: str = "text"
    tokenizer: Literal["bytes"] | Tokenizer = "bytes"
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Of existing token shards (`source: tokens`)."""
    vocab_size: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_TOKEN_IDS)] | None = (
        None
    )
    """Needed with `source: tokens`; otherwise the tokenizer's."""
    validation_paths: tuple[str, ...] = ()
    """Held-out files; default: a share of the documents chosen by hash."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    validation_sequences: Count = 256
    """Size of the one validation slice that all trials of a study are measured on."""
    max_megabytes: Positive | None = None
    """Stop reading the corpus after this much text."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source != "machine" and not self.paths:
            raise ValueError(f"data source {self.source} needs paths")
        if self.source == "machine" and self.paths:
            raise ValueError(
                "data source machine takes no paths: set source to text, or drop paths"
            )
        if self.source == "tokens" and self.vocab_size is None:
            raise ValueError("data source tokens needs vocab_size")
        if self.source != "tokens" and self.vocab_size is not None:
            raise ValueError("vocab_size follows from the tokenizer: drop it")
        return self


class Target(Section):
    """A run that the report recommends for."""

    architecture: Name
    params: Positive
    """Active non-embedding parameters."""
    tokens: Positive


class SearchSpace(Section):
    """One search-space file: a study."""

    study: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    architectures: Annotated[dict[Name, Architecture], Field(min_length=1)] = {
        "dense": Architecture()
    }
    scales: Annotated[tuple[ScaleEntry, ...], Field(min_length=1)]
    horizons: Annotated[tuple[Horizon, ...], Field(min_length=1)]
    model: ModelSettings = ModelSettings()
    search: Search = Search()
    recipe: Recipe = Recipe()
    data: Data = Data()
    resources: Resources = Resources()
    targets: tuple[Target, ...] = ()
    logging: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the progress of trials goes besides the results: TensorBoard events in the results
    folder; Weights & Biases and MLflow, where installed, as their own variables say."""

    @model_validator(mode="after")
    def _branches_run_to_their_end(self) -> Self:
        if self.recipe.branches and self.search.early_stopping is not None:
            raise ValueError("recipe.branches and search.early_stopping exclude each other")
        return self

    @model_validator(mode="after")
    def _early_stopping_reaches_its_trials(self) -> Self:
        if self.search.early_stopping is None:
            return self
        for i, scale in enumerate(self.scales):
            workers = (scale.resources or self.resources).workers
            if workers > 1:  # Tune cannot end a trial that waits for workers of Ray Train's
                raise ValueError(
                    f"search.early_stopping is for trials on one worker, and scale {i} has "
                    f"{workers}: drop early_stopping, or set its workers to 1"
                )
        return self

    @model_validator(mode="after")
    def _names_known(self) -> Self:
        known = ", ".join(self.architectures)
        named = [
            (f"scale {i}", a) for i, s in enumerate(self.scales) for a in s.architectures or ()
        ]
        named += [(f"target {i}", t.architecture) for i, t in enumerate(self.targets)]
        for where, architecture in named:
            if architecture not in self.architectures:
                raise ValueError(f"{where} names architecture {architecture!r}; known: {known}")
        return self
