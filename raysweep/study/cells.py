"""Keys of the search-space file that say what is trained: models, horizons, on what machines."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from raysweep.study.fields import (
    MAX_LAYERS,
    Count,
    Name,
    NonNegative,
    Params,
    Positive,
    Ratio,
    Section,
)
from raysweep.text import short


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
    first_dense: Annotated[int, Field(ge=0, le=MAX_LAYERS)] = 0
    """So many first layers stay dense (DeepSeekMoE, arXiv 2401.06066)."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How the router scores experts: against each other, or each on its own (DeepSeek-V3)."""
    route_scale: Positive = 1.0
    """Factor of the routed experts' output (DeepSeek-V3, arXiv 2412.19437, takes 2.5: normalised
    weights make it smaller than that of the shared experts)."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How expert load is balanced: an auxiliary loss, a router bias without loss (it moves in
    proportion to tokens, whatever the batch size), or not at all."""
    balance_loss: NonNegative = 0.01
    """Weight of the load-balance loss (Switch Transformer's), when `balance: loss`."""
    router_z_loss: NonNegative = 0.001
    """Weight of the router z-loss (ST-MoE)."""
    settings: dict[str, JsonValue] = Field(default={})
    """For your own training code: what it is to know of this architecture."""

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
    """The workers, CPUs and GPUs of one trial, and how its model is spread over them."""

    workers: Annotated[int, Field(ge=1, le=65536)] = 1
    """Processes that train one model together. One worker trains inside a reused Tune actor."""
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    """May be a fraction with one worker: several small trials then share a card."""
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How parameters are spread over workers: replicated, sharded (FSDP2), or sharded over the
    workers of a node and replicated over nodes."""
    micro_batch_sequences: Annotated[int, Field(ge=1)] | None = None
    """Largest batch one worker holds at once; derived from memory if left out. Never changes the
    result, only speed."""

    @property
    def threads(self) -> int:
        """Of a worker: its whole CPUs, at least one."""
        return max(1, int(self.cpus_per_worker))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers & (self.workers - 1):
            raise ValueError(
                f"workers {self.workers} is no power of two, as batches are: change it"
            )
        if self.workers > 1 and self.gpus_per_worker % 1:
            raise ValueError("a fraction of a GPU means one worker: set workers: 1")
        if self.gpus_per_worker > 1:
            power = 1 << (math.ceil(self.gpus_per_worker * self.workers) - 1).bit_length()
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: a worker is a process and trains on "
                f"one GPU: set workers: {power} and gpus_per_worker: 1"
            )
        return self


class Horizon(Section):
    """A budget of a run: tokens, tokens per parameter of the scale's dense twin (non-embedding), or
    training FLOPs, which each model turns into the tokens that they pay for (an IsoFLOP
    profile)."""

    tokens_per_param: Positive | None = None
    tokens: Positive | None = None
    flops: Positive | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(v is not None for v in (self.tokens_per_param, self.tokens, self.flops)) != 1:
            raise ValueError("a horizon is one of tokens_per_param, tokens and flops")
        return self

    @property
    def label(self) -> str:
        """The suffix of its cells' names, such as `20tpp` or `1Btok`."""
        if self.tokens_per_param is not None:
            return f"{self.tokens_per_param:g}tpp"
        if self.tokens is not None:
            return f"{short(self.tokens)}tok"
        return f"{self.flops:.3g}flops".replace("e+", "e")

    def tokens_of(self, params_dense: float, flops_per_token: float) -> float:
        """Tokens that a model is trained on."""
        if self.tokens_per_param is not None:
            return self.tokens_per_param * params_dense
        if self.tokens is not None:
            return self.tokens
        assert self.flops is not None
        return self.flops / flops_per_token


class ScaleEntry(Section):
    """One rung: an explicit shape (d_model, layers, heads) or a `params` target; of your own
    training code its `settings` and counts."""

    name: Name | None = None
    params: Params | None = None
    """Dense non-embedding parameters aimed at: the shape is derived, its true count reported. Of
    your own models, their non-embedding parameters."""
    d_model: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] | None = None
    heads: Annotated[int, Field(ge=1, le=100_000)] | None = None
    kv_heads: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fewer key-value heads than heads is grouped-query attention; default: as many."""
    d_ff: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    architectures: tuple[Name, ...] | None = None
    """Architectures built at this scale; default: all."""
    horizons: Annotated[tuple[Horizon, ...], Field(min_length=1)] | None = None
    """Horizons of this scale; default: the file's `horizons`."""
    resources: Resources | None = None
    """Resources of this scale's trials; default: the file's `resources`."""
    settings: dict[str, JsonValue] | None = None
    """For your own training code: what makes this scale, in its own words."""
    params_active: Params | None = None
    """Of your own models: non-embedding parameters that a token passes, for experts."""
    params_total: Params | None = None
    """Of your own models: all non-embedding parameters, for experts."""
    params_dense: Params | None = None
    """Of your own models: non-embedding parameters of the dense model that this one is compared
    with; default: the active ones. `tokens_per_param` counts these."""
    params_embedding: Params | None = None
    """Of your own models: parameters of input embedding and output head together."""
    flops_per_token: Positive | None = None
    """Of your own models: FLOPs a token, forward and backward."""

    @property
    def is_own(self) -> bool:
        """Whether it sets a key that only a user's own training code reads (settings, counts)."""
        return any(
            value is not None
            for value in (
                *(self.settings, self.params_active, self.params_total, self.params_dense),
                *(self.params_embedding, self.flops_per_token),
            )
        )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        shape = (self.d_model, self.layers, self.heads)
        if self.is_own:
            if any(v is not None for v in (*shape, self.kv_heads, self.d_ff)):
                raise ValueError(
                    "d_model, layers, heads and d_ff are of raysweep's models: of your own, give "
                    "them under settings"
                )
            return self
        if self.params is not None and any(v is not None for v in (*shape, self.d_ff)):
            raise ValueError("give either params or a shape (d_model, layers, heads), not both")
        if self.params is None and any(v is None for v in shape):
            raise ValueError(
                "a scale needs either params, or d_model, layers and heads; with training of your "
                "own, its settings or counts"
            )
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
