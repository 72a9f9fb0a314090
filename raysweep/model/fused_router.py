"""The router as one autograd function: `moe.route` for CPUs.

Its rows, a number an expert, are short, so operations are many and small. They are fastest on
logits that lie expert by expert, as `fused.linear` gives them for few experts. Shape suffixes: see
`raysweep.model.functional`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from raysweep.model.moe import Routing
from raysweep.study.cells import Architecture


def route(
    logits_NE: Tensor, top_k: int, share_E: Tensor, bias_E: Tensor, settings: Architecture
) -> Routing:
    """Choose `top_k` experts a token, as `moe.route` does."""
    share = bias = None
    if settings.balance == "loss":
        share = share_E.to(logits_NE.dtype) * (settings.balance_loss * len(share_E))
    elif settings.balance == "bias":
        bias = bias_E
    arguments = logits_NE, top_k, share, bias, settings.router_z_loss
    weights, loss, experts, probs = _Route.apply(*arguments)  # type: ignore[misc]
    if settings.route_scale != 1:
        weights = weights * settings.route_scale
    return Routing(experts, weights, probs, loss)


class _Route(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NE: Tensor,
        top_k: int,
        share_E: Tensor | None,
        bias_E: Tensor | None,
        z_loss: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        most = logits_NE.amax(-1, keepdim=True)
        probs = (logits_NE - most).exp_()
        total = probs.sum(-1, keepdim=True)
        probs /= total
        experts = _best(probs if bias_E is None else probs + bias_E, top_k)
        weights, share_of_all = probs.gather(-1, experts), None
        if top_k > 1:
            share_of_all = weights.sum(-1, keepdim=True)
            weights = weights / share_of_all
        loss = logits_NE.new_zeros(())
        if share_E is not None:
            loss += torch.dot(probs.mean(0), share_E)
        normaliser = None
        if z_loss:
            normaliser = total.log_().add_(most).flatten()
            loss += torch.dot(normaliser, normaliser) * (z_loss / len(normaliser))
        ctx.save_for_backward(normaliser, probs, experts, weights, share_of_all, share_E)
        ctx.z_loss = z_loss
        ctx.mark_non_differentiable(experts, probs)
        return weights, loss, experts, probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        normaliser, probs, experts, weights, share_of_all, share_E = ctx.saved_tensors
        d_weights, d_loss = grads[0], grads[1] / len(probs)
        if share_of_all is not None:
            along = (d_weights * weights).sum(-1, keepdim=True)
            d_weights = (d_weights - along).div_(share_of_all)
        d_probs = torch.zeros_like(probs).scatter_(1, experts, d_weights)
        if share_E is not None:
            d_probs += share_E * d_loss
        along = (probs * d_probs).sum(-1)
        if normaliser is not None:  # whose gradient is the probabilities
            along -= normaliser * (2 * ctx.z_loss * d_loss)
        return d_probs.sub_(along.unsqueeze(-1)).mul_(probs), None, None, None, None


def _best(scores_NE: Tensor, k: int) -> Tensor:
    """Each row's k best (N, k), the best first: for few, one maximum after another is several
    times as fast as a partial sort."""
    if k > 2:
        return scores_NE.topk(k, -1).indices
    first = scores_NE.max(-1, keepdim=True).indices
    if k == 1:
        return first
    second = scores_NE.scatter(-1, first, -math.inf).max(-1, keepdim=True).indices
    return torch.cat([first, second], -1)
