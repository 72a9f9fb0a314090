"""Mixture-of-experts feed-forward: top-k routing, dropless grouped experts, load balance.

Shape suffixes: see `raysweep.model.functional`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raysweep.model import functional
from raysweep.study.cells import Architecture

BIAS_STEP = 0.001
"""Update of the router bias after each step (Wang et al. 2024, arXiv 2408.15664)."""


@dataclass(frozen=True)
class Routing:
    """Where tokens go, and what routing adds to the loss."""

    experts_NK: Tensor
    weights_NK: Tensor
    probs_NE: Tensor
    loss: Tensor
    """Balance loss and router z-loss, already weighted; zero where both are off."""

    def confidence(self) -> Tensor:
        """Probability given to the chosen experts, summed over tokens."""
        return self.probs_NE.gather(-1, self.experts_NK).sum()


def route(
    logits_NE: Tensor, top_k: int, share_E: Tensor, bias_E: Tensor, settings: Architecture
) -> Routing:
    """Choose `top_k` experts a token by probability (plus bias, which gets no gradient).

    The chosen weights sum to one; with one expert a token the weight is its probability, so that
    the router learns (Switch Transformer). The balance loss is Switch's `E sum_e f_e P_e`, summed
    over layers by the caller. f_e is the share of the *previous* global batch, a constant in the
    gradient anyway: so the loss is a mean over tokens, and the same however a batch is split.
    """
    wide = logits_NE if logits_NE.dtype == torch.float64 else logits_NE.float()
    normaliser = torch.logsumexp(wide, -1)
    probs = (wide - normaliser[:, None]).exp()  # much faster on CPUs than softmax of short rows
    scores = probs + bias_E if settings.balance == "bias" else probs
    experts = scores.topk(top_k, -1).indices
    weights = probs.gather(-1, experts)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    loss = wide.new_zeros(())
    if settings.balance == "loss":
        loss = loss + settings.balance_loss * len(share_E) * (
            probs.mean(0) @ share_E.to(wide.dtype)
        )
    if settings.router_z_loss:
        loss = loss + settings.router_z_loss * normaliser.square().mean()
    return Routing(experts, weights, probs, loss)


def dispatch(experts_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs (token k) sorted by expert: their flat indices (M,), and each expert's end (E,)."""
    sorted_experts, order = experts_NK.flatten().sort(stable=True)
    bounds = torch.arange(n_experts, device=experts_NK.device)
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
    """The same in one kernel where the device has one (bfloat16 on GPUs from Ampere on)."""
    if x_MD.is_cuda and x_MD.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x_MD, weight_EDF, offs=ends_E)
    return expert_loop(x_MD, weight_EDF, ends_E)


def mix(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each token's experts, and the experts' loads. No token is dropped."""
    n_experts, top_k = gate_up_EDF.shape[0], routing.experts_NK.shape[1]
    order, ends = dispatch(routing.experts_NK, n_experts)
    x_MD = x_ND[order // top_k]
    hidden = functional.swiglu(grouped_matmul(x_MD, gate_up_EDF, ends))
    y_MD = grouped_matmul(hidden, down_EFD, ends)
    # Sorted back by a gather, not a scatter-add: the sum is then in a fixed order on GPUs as well.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    y_NKD = y_MD[back].unflatten(0, (-1, top_k))
    return (y_NKD * routing.weights_NK[..., None].to(y_NKD.dtype)).sum(1), loads(ends)
