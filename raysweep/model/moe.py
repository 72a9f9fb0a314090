"""Mixture-of-experts feed-forward: top-k routing, dropless grouped experts, load balance.

Shape suffixes: see `raysweep.model.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from raysweep.model import functional
from raysweep.study.cells import Architecture
from raysweep.study.shape import ModelShape, count

BIAS_TOKENS = 0.1
"""Tokens over which the router bias follows a load, per active non-embedding parameter."""
SIGMOID_UNIT = 0.25
"""How far sigmoid scores of one token lie apart, about; those of a softmax lie 1 / E apart."""


@dataclass(frozen=True)
class Routing:
    """Where tokens go, and what routing adds to the loss."""

    experts_NK: Tensor
    weights_NK: Tensor
    probs_NE: Tensor
    loss: Tensor
    """Balance loss and router z-loss, already weighted; zero where both are off."""

    def confidence(self) -> Tensor:
        """Probability given to the chosen experts together (N,)."""
        return self.probs_NE.gather(-1, self.experts_NK).sum(-1)


def route(
    logits_NE: Tensor, top_k: int, share_E: Tensor, bias_E: Tensor, settings: Architecture
) -> Routing:
    """Choose `top_k` experts a token by score (plus bias, which gets no gradient).

    Scores are a softmax, or with `scores: sigmoid` each expert's own (DeepSeek-V3, arXiv
    2412.19437), then divided by their sum to give probabilities. The chosen weights sum to
    `route_scale`; with one expert a token the weight is its score, times that, so that the router
    learns (Switch Transformer).
    The balance loss is Switch's `E sum_e f_e P_e`, summed over layers by the caller. f_e is the
    share of the *previous* global batch, a constant in the gradient anyway: so the loss is a mean
    over tokens, and the same however a batch is split.
    """
    wide = functional.widen(logits_NE)
    normaliser = torch.logsumexp(wide, -1)
    if settings.scores == "sigmoid":
        scores = wide.sigmoid()
        probs = scores / scores.sum(-1, keepdim=True)
    else:
        scores = probs = (wide - normaliser[:, None]).exp()  # on CPUs much faster than softmax
    with torch.no_grad():
        choice = scores + bias_E if settings.balance == "bias" else scores
        experts = choice.topk(top_k, -1).indices
    weights = _Choose.apply(scores, experts)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)  # type: ignore[union-attr]
    if settings.route_scale != 1:
        weights = weights * settings.route_scale  # type: ignore[operator]
    loss = wide.new_zeros(())
    if settings.balance == "loss":
        loss = loss + settings.balance_loss * len(share_E) * (
            probs.mean(0) @ share_E.to(wide.dtype)
        )
    if settings.router_z_loss:
        loss = loss + settings.router_z_loss * normaliser.square().mean()
    return Routing(experts, weights, probs, loss)  # type: ignore[arg-type]


def bias_motion(load_E: Tensor, shape: ModelShape, settings: Architecture) -> Tensor:
    """What a global batch of these loads (..., E) adds to the router bias.

    An expert's bias moves by its lack of tokens, in proportion to the tokens seen: over a given
    stretch of training it moves as far in a few large batches as in many small ones. (The usual
    step of a fixed size per batch, Wang et al. 2024, arXiv 2408.15664, does not, which would tie
    balance to the batch size.) It closes a lack within about `BIAS_TOKENS` tokens a parameter.
    """
    mean = load_E.mean(-1, keepdim=True)
    tokens = mean * shape.experts / shape.top_k
    pace = BIAS_TOKENS * count(shape).params_active_non_embedding
    unit = SIGMOID_UNIT if settings.scores == "sigmoid" else 1 / shape.experts
    # A load changes by about E / (2 K) of itself for a unit of bias: with the last factor the
    # motion stays stable up to batches of four times the pace, and is cut before.
    gain = (tokens / pace).clamp(max=1.0) * unit * shape.top_k / shape.experts
    return gain * (1 - load_E / mean)


def dispatch(experts_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs (token k) sorted by expert: their flat indices (M,), and each expert's end (E,)."""
    short = torch.int16 if n_experts < 1 << 15 else torch.int64  # fewer passes of a radix sort
    sorted_experts, order = experts_NK.flatten().to(short).sort(stable=True)
    bounds = torch.arange(n_experts, device=experts_NK.device, dtype=short)
    ends = torch.searchsorted(sorted_experts, bounds, right=True, out_int32=True)
    return order, ends


def loads(ends_E: Tensor) -> Tensor:
    """Pairs each expert got, from the ends of the sorted segments."""
    return torch.diff(ends_E, prepend=ends_E.new_zeros(1))


def expert_loop(x_MD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's matrix applied to its segment of rows, one after another: the reference."""
    sizes = loads(ends_E).tolist()
    parts = zip(x_MD.split(sizes), weight_EDF.unbind(0), strict=True)
    return torch.cat([x @ weight for x, weight in parts])


def grouped_matmul(x_MD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The same in one kernel for bfloat16, which `torch.compile` takes as well."""
    if x_MD.dtype == torch.bfloat16:
        return F.grouped_mm(x_MD, weight_EDF, offs=ends_E)
    return expert_loop(x_MD, weight_EDF, ends_E)


def mix(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each token's experts, and the experts' loads. No token is dropped.

    Forward and backward gather rows and never scatter them: sums are in a fixed order, on GPUs as
    well.
    """
    n_experts, top_k = gate_up_EDF.shape[0], routing.experts_NK.shape[1]
    order, ends = dispatch(routing.experts_NK, n_experts)
    load = loads(ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    gate_up, down = (_OfBusyExperts.apply(w, load) for w in (gate_up_EDF, down_EFD))
    x_MD = _ToExperts.apply(x_ND, order, back, top_k)
    hidden = functional.swiglu(grouped_matmul(x_MD, gate_up, ends))  # type: ignore[arg-type]
    y_MD = grouped_matmul(hidden, down, ends)  # type: ignore[arg-type]
    y_NKD = _FromExperts.apply(y_MD, order, back).unflatten(0, (-1, top_k))  # type: ignore[union-attr]
    return (y_NKD * routing.weights_NK[..., None].to(y_NKD.dtype)).sum(1), load


Mix = Callable[[Tensor, Tensor, Tensor, Routing], tuple[Tensor, Tensor]]


def experts(
    h_BTD: Tensor,
    logits_NE: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    share_E: Tensor,
    bias_E: Tensor,
    top_k: int,
    settings: Architecture,
    mix: Mix = mix,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Routed and shared experts of normed activations: (output like them, loss of the router,
    load (E,), experts (N, K), and outside training the probability given to them (N,)).
    `mix` does the routed ones' part."""
    h, dtype = h_BTD.flatten(0, 1), h_BTD.dtype
    routing = route(logits_NE, top_k, share_E, bias_E, settings)
    y, load = mix(h, gate_up.to(dtype), down.to(dtype), routing)
    if shared_gate_up is not None and shared_down is not None:
        # Shared experts see every token, so together they are one wide SwiGLU.
        y = y + functional.swiglu(h @ shared_gate_up.to(dtype)) @ shared_down.to(dtype)
    confidence = None if torch.is_grad_enabled() else routing.confidence()
    return y.view_as(h_BTD), routing.loss, load, routing.experts_NK, confidence


def experts_block(
    x_BTD: Tensor, norm: Tensor, router: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x + experts(norm(x)), of logits in float32 at least; then what else `experts` gives, of
    whose arguments `rest` are the last."""
    h = functional.rms_norm(x_BTD, norm)
    y, *routed = experts(h, functional.widen(h.flatten(0, 1)) @ router, *rest)
    return x_BTD + y, *routed  # type: ignore[return-value]


class _ToExperts(Function):
    """Rows in the order of their experts; each token has K of them. Backward gathers a token's rows
    by the inverse order and sums them in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, back_M: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(back_M)
        ctx.top_k = top_k
        return x_ND[order_M // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (back_M,) = ctx.saved_tensors
        rows_NKD = grads[0][back_M].unflatten(0, (-1, ctx.top_k))
        return functional.widen(rows_NKD).sum(1).to(grads[0].dtype), None, None, None


class _FromExperts(Function):
    """Rows sorted back into the order of tokens; backward sorts them forth again."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, order_M: Tensor, back_M: Tensor) -> Tensor:
        ctx.save_for_backward(order_M)
        return y_MD[back_M]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (order_M,) = ctx.saved_tensors
        return grads[0][order_M], None, None


class _Choose(Function):
    """Scores of the chosen experts. All indices of a row differ, so the backward pass writes each
    place once, where that of `gather` would add."""

    @staticmethod
    def forward(ctx: Any, scores_NE: Tensor, experts_NK: Tensor) -> Tensor:
        ctx.save_for_backward(experts_NK)
        ctx.n_experts = scores_NE.shape[1]
        return scores_NE.gather(-1, experts_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (experts_NK,) = ctx.saved_tensors
        zeros = grads[0].new_zeros(len(experts_NK), ctx.n_experts)
        return zeros.scatter(-1, experts_NK, grads[0]), None


class _OfBusyExperts(Function):
    """Weights whose gradient is zero for experts without a token: the grouped kernel leaves theirs
    unwritten on some GPUs (PyTorch issue 172439)."""

    @staticmethod
    def forward(ctx: Any, weight_EDF: Tensor, load_E: Tensor) -> Tensor:
        ctx.save_for_backward(load_E)
        return weight_EDF.view_as(weight_EDF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (load_E,) = ctx.saved_tensors
        return torch.where(load_E[:, None, None] > 0, grads[0], 0.0), None
