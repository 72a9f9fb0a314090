"""Shapes of models and sizes of runs: exact parameter and FLOP counts, and shapes from a target.

Conventions, stated once and used everywhere:

- *non-embedding* leaves out the input embedding and the output head (Kaplan et al. 2020); every
  norm gain, router and QK-norm gain is counted.
- *active* parameters are those a token passes through: `top_k` routed experts, all shared experts,
  and the whole router.
- FLOPs are multiply-adds counted as two, over matrix products only: projections, attention scores
  and values over the causal average context of (T + 1) / 2, routers, experts and the head. A
  backward pass costs two forward passes. Norms, activations and the optimizer are left out.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace

from raysweep.errors import UserError

COUNTS = (
    "params_active_non_embedding",
    "params_total_non_embedding",
    "params_active",
    "params_total",
    "params_dense",
)
"""The parameter counts that a law may take as its N."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that fixes the parameters of a decoder. `experts == 1` means dense."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab_size: int
    sequence_length: int
    qk_norm: bool = True
    tie_embeddings: bool = False
    experts: int = 1
    top_k: int = 1
    shared_experts: int = 0
    expert_ff: int = 0
    """Hidden width of one expert (routed or shared); 0 for dense."""
    moe_layers: tuple[int, ...] = ()
    """Indices of the layers whose feed-forward is a mixture of experts."""

    def __post_init__(self) -> None:
        sizes = (self.d_model, self.layers, self.heads, self.kv_heads, self.d_ff, self.vocab_size)
        if min(*sizes, self.sequence_length) < 1:
            raise UserError(f"a model shape needs sizes of at least 1: {self}")
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise UserError(
                f"d_model {self.d_model} must split into {self.heads} heads of an even size "
                "(rotary embeddings turn pairs): change d_model or heads"
            )
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.is_moe and not 1 <= self.top_k <= self.experts:
            raise UserError(f"top_k {self.top_k} must lie between 1 and experts {self.experts}")
        if self.is_moe and (self.expert_ff < 1 or not self.moe_layers):
            raise UserError("a mixture of experts needs expert_ff of at least 1 and a MoE layer")
        self.check_alignment(bytes_each=4)

    @property
    def is_moe(self) -> bool:
        return self.experts > 1

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    def check_alignment(self, bytes_each: int) -> None:
        """Raises UserError where the experts' kernel could not take rows of such numbers: they must
        be a multiple of 16 bytes long."""
        multiple = 16 // bytes_each
        if not self.is_moe:
            return
        for name, width in (("d_model", self.d_model), ("expert_ff", self.expert_ff)):
            if width % multiple:
                raise UserError(
                    f"{name} {width} of a mixture of experts must be a multiple of {multiple} "
                    f"(rows of 16 bytes): use {round_to(width, multiple)}"
                )

    def dense_twin(self) -> ModelShape:
        """The dense model of the same shape: what a MoE of this scale is compared with."""
        return replace(self, experts=1, top_k=1, shared_experts=0, expert_ff=0, moe_layers=())


@dataclass(frozen=True)
class Counts:
    """Parameter counts, and training FLOPs per token (forward and backward)."""

    params_total: int
    params_active: int
    params_total_non_embedding: int
    params_active_non_embedding: int
    flops_per_token: float

    def flops_6nd(self, tokens: float) -> float:
        """The usual approximation 6 N D, N active and non-embedding."""
        return 6.0 * self.params_active_non_embedding * tokens


@dataclass(frozen=True)
class RunSize:
    """The size of one run: every count that a law may take as its N, the tokens, and the routing.

    Counts are parameters: *active* ones act on a token, *non-embedding* leaves out the input
    embedding and the output head. Only the active non-embedding count and the tokens must be known;
    of the rest, `params_total_non_embedding` falls back to what `experts / top_k` say, and NaN
    stands for what is not known. `flops` are those of the whole run, 6 N D where they are not
    given.

    Raises:
        UserError: a count that is not positive, or a total below the active parameters.
    """

    params_active_non_embedding: float
    tokens: float
    experts: int = 1
    top_k: int = 1
    params_total_non_embedding: float = math.nan
    params_active: float = math.nan
    params_total: float = math.nan
    params_dense: float = math.nan
    """Non-embedding parameters of the dense twin."""
    head_params: float = math.nan
    """Parameters of the output head."""
    flops: float = math.nan
    group: str = ""
    """Of recipes (optimizer, schedule, ...), where results are grouped by them."""
    name: str = "run"
    """Of the cell, where the run is one."""

    def __post_init__(self) -> None:
        for field in ("params_active_non_embedding", "tokens", "experts", "top_k"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{self.name}: {field} must be positive, got {value}")
        if self.params_total_non_embedding < self.params_active_non_embedding * (1 - 1e-9):
            raise UserError(
                f"{self.name}: params_total_non_embedding {self.params_total_non_embedding:g} is "
                f"below the active {self.params_active_non_embedding:g}"
            )

    @property
    def compute(self) -> float:
        """FLOPs of the run: `flops`, or 6 N D where they are not given."""
        if math.isfinite(self.flops):
            return self.flops
        return 6.0 * self.params_active_non_embedding * self.tokens

    @property
    def log_sparsity(self) -> float:
        """ln(total / active parameters); ln(experts / top_k) where the total is not known."""
        if math.isfinite(self.params_total_non_embedding):
            return math.log(
                max(self.params_total_non_embedding / self.params_active_non_embedding, 1.0)
            )
        return max(0.0, math.log(self.experts / self.top_k))

    @property
    def routing(self) -> tuple[int, int]:
        """(experts, top_k)."""
        return (self.experts, self.top_k)


def count(shape: ModelShape) -> Counts:
    """Exact counts of a shape; equal to the built model's, which a test checks for every scale."""
    d, head_dim = shape.d_model, shape.head_dim
    attention = 2 * d * d + 2 * d * shape.kv_heads * head_dim
    norms = 2 * d + (2 * head_dim if shape.qk_norm else 0)
    dense_ffn = 3 * d * shape.d_ff
    expert = 3 * d * shape.expert_ff
    router = d * shape.experts
    n_moe = len(shape.moe_layers)
    n_dense = shape.layers - n_moe

    per_layer = (
        shape.layers * (attention + norms) + n_dense * dense_ffn + n_moe * router * shape.is_moe
    )
    total = per_layer + n_moe * (shape.experts + shape.shared_experts) * expert + d
    active_experts = shape.top_k + shape.shared_experts
    active = per_layer + n_moe * active_experts * expert + d

    head = d * shape.vocab_size
    embeddings = head if shape.tie_embeddings else 2 * head
    matmul_params = active - shape.layers * norms - d + head
    scores_and_values = shape.layers * 2 * 2 * d * (shape.sequence_length + 1) / 2
    forward = 2 * matmul_params + scores_and_values
    return Counts(
        params_total=total + embeddings,
        params_active=active + embeddings,
        params_total_non_embedding=total,
        params_active_non_embedding=active,
        flops_per_token=3 * forward,
    )


def round_to(value: float, multiple: int) -> int:
    """The multiple nearest to `value`, at least one multiple."""
    return max(1, round(value / multiple)) * multiple


def feed_forward_width(d_model: int, ratio: float, multiple: int) -> int:
    """Hidden width of a SwiGLU block: `ratio * d_model` rounded to a multiple (8/3 is usual)."""
    return round_to(ratio * d_model, multiple)


def derive_width_depth(
    params: float, *, head_dim: int, aspect_ratio: float, ffn_ratio: float, ffn_multiple: int
) -> tuple[int, int]:
    """The (d_model, layers) whose dense non-embedding count comes closest to `params`.

    The rule: d_model is a multiple of `head_dim`; depth is whatever brings the count nearest; of
    the candidates, the least of |ln(count / params)| + 0.1 |ln(d_model / layers / aspect_ratio)|
    wins: a count within a few per cent is preferred, and the aspect ratio decides among those.
    """
    if not (math.isfinite(params) and params > 0):
        raise UserError(f"params: {params} must be a positive number")

    def layers_and_count(d_model: int) -> tuple[int, int]:
        d_ff = feed_forward_width(d_model, ffn_ratio, ffn_multiple)
        per_layer = 4 * d_model**2 + 3 * d_model * d_ff + 2 * d_model + 2 * head_dim
        layers = max(1, round(params / per_layer))
        return layers, layers * per_layer + d_model

    def stretch(d_model: int) -> float:
        return math.log(d_model / layers_and_count(d_model)[0] / aspect_ratio)

    width_cap = 4 * (params * aspect_ratio) ** (1 / 3) + 2 * head_dim
    widths = range(head_dim, int(width_cap) + 1, head_dim)
    # The stretch grows with the width. From where it is nearest to zero, walk both ways until it
    # alone costs more than the best: the largest models have a hundred thousand candidates.
    middle = bisect.bisect_left(widths, 0.0, key=stretch)
    best = (math.inf, 0, 0)
    for side in (widths[middle:], reversed(widths[:middle])):
        for d_model in side:
            stretched = 0.1 * abs(stretch(d_model))
            if stretched > best[0]:
                break
            layers, counted = layers_and_count(d_model)
            best = min(best, (abs(math.log(counted / params)) + stretched, d_model, layers))
    return best[1], best[2]
