"""A decoder-only transformer, dense or mixture of experts, built from a `ModelShape`.

Pre-norm blocks of causal attention with rotary embeddings and a SwiGLU feed-forward or a mixture
of SwiGLU experts; no biases. Shape suffixes: see `raysweep.model.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysweep.model import functional, fused, fused_attention, fused_experts, moe
from raysweep.model.compiled import compiled
from raysweep.study.cells import Architecture
from raysweep.study.shape import ModelShape

ROUTING = ("expert_load", "expert_share", "expert_bias")
"""Buffers of a decoder, one row a MoE layer."""
Runner = Callable[..., Any]
"""Calls a plain function with its arguments, or what stands for it on this device."""


HAND_WRITTEN: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.attention_block: fused_attention.attention_block,
    functional.feed_forward_block: fused.feed_forward_block,
    functional.head_loss: fused.head_loss,
    moe.experts_block: fused_experts.experts_block,
}
"""What stands for a plain function where `fused.usable`."""


class Losses(NamedTuple):
    """What a forward pass gives: scalars, means over the tokens it saw."""

    objective: Tensor
    """To minimise: cross-entropy plus whatever the recipe and the routers add."""
    cross_entropy: Tensor
    """Nats a token, detached."""


class RouterStats(NamedTuple):
    """Routing of an evaluated batch, one row a MoE layer."""

    load: Tensor
    """(layers, E) pairs each expert got."""
    confidence: Tensor
    """(layers,) probability given to the chosen experts, summed over tokens."""


class Attention(nn.Module):
    """Norm, projections, optional QK-norm, rotary embedding, causal attention; added to x."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.kv_heads = shape.kv_heads
        d, width = shape.d_model, shape.heads * shape.head_dim
        self.norm = _weight(d)
        self.qkv = _weight(d, width + 2 * shape.kv_heads * shape.head_dim)
        self.q_norm = _weight(shape.head_dim) if shape.qk_norm else None
        self.k_norm = _weight(shape.head_dim) if shape.qk_norm else None
        self.out = _weight(width, d)

    def forward(self, x_BTD: Tensor, rope: Tensor, run: Runner) -> Tensor:
        norms = self.norm, self.qkv, self.q_norm, self.k_norm
        return run(functional.attention_block, x_BTD, *norms, self.out, rope, self.kv_heads)


class FeedForward(nn.Module):
    """Norm and SwiGLU; added to x."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = _weight(shape.d_model)
        self.gate_up = _weight(shape.d_model, 2 * shape.d_ff)
        self.down = _weight(shape.d_ff, shape.d_model)

    def forward(self, x_BTD: Tensor, run: Runner) -> Tensor:
        return run(functional.feed_forward_block, x_BTD, self.norm, self.gate_up, self.down)


class Router(nn.Module):
    """The router's weight: a module of its own, so that workers which shard a model in bfloat16
    gather it as it is, in float32. It does what needs it: a block, of activations and the weight.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = _weight(shape.d_model, shape.experts)

    def forward(self, x_BTD: Tensor, block: Callable[[Tensor, Tensor], Any]) -> Any:
        return block(x_BTD, self.weight)


class ExpertsOutput(NamedTuple):
    x_BTD: Tensor
    loss: Tensor
    """Balance loss and router z-loss."""
    load_E: Tensor
    experts_NK: Tensor
    confidence_N: Tensor | None
    """Probability given to the chosen experts together; None in training."""


class Experts(nn.Module):
    """Norm, router, routed and shared experts; added to x."""

    def __init__(self, shape: ModelShape, settings: Architecture) -> None:
        super().__init__()
        self.settings, self.top_k = settings, shape.top_k
        d, width, shared = shape.d_model, shape.expert_ff, shape.shared_experts * shape.expert_ff
        self.norm = _weight(d)
        self.router = Router(shape)
        self.gate_up = _weight(shape.experts, d, 2 * width)
        self.down = _weight(shape.experts, width, d)
        self.shared_gate_up = _weight(d, 2 * shared) if shared else None
        self.shared_down = _weight(shared, d) if shared else None

    def forward(self, x_BTD: Tensor, share_E: Tensor, bias_E: Tensor, run: Runner) -> ExpertsOutput:
        weights = self.gate_up, self.down, self.shared_gate_up, self.shared_down
        balance = share_E, bias_E, self.top_k, self.settings

        def block(x_BTD: Tensor, router: Tensor) -> Any:
            return run(moe.experts_block, x_BTD, self.norm, router, *weights, *balance)

        return ExpertsOutput(*self.router(x_BTD, block))


class Decoder(nn.Module):
    """Tokens in, losses out. Built by `raysweep.model.build`.

    Its blocks are plain functions of tensors (`functional`, `moe`), compiled where `compiled` is
    set; or hand-written ones (`fused`) in full precision on CPUs.
    """

    rope: Tensor
    expert_load: Tensor
    expert_share: Tensor
    expert_bias: Tensor

    def __init__(
        self, shape: ModelShape, settings: Architecture, *, rope_base: float, z_loss: float
    ) -> None:
        super().__init__()
        self.shape, self.settings, self.z_loss = shape, settings, z_loss
        self.rope_base = rope_base
        self.dtype: torch.dtype | None = None
        """Of activations and products, if not that of the weights."""
        self.compiled = False
        """Whether blocks are compiled."""
        self.recompute = False
        """Whether blocks forget their activations and compute them again for the backward pass."""
        self.embedding = _weight(shape.vocab_size, shape.d_model)
        self.attention = nn.ModuleList(Attention(shape) for _ in range(shape.layers))
        routed = set(shape.moe_layers) if shape.is_moe else set()
        self.feed_forward = nn.ModuleList(
            Experts(shape, settings) if i in routed else FeedForward(shape)
            for i in range(shape.layers)
        )
        self.norm = _weight(shape.d_model)
        self.head = None if shape.tie_embeddings else _weight(shape.d_model, shape.vocab_size)
        table = torch.empty(shape.sequence_length, shape.head_dim // 2, 2)
        self.register_buffer("rope", table, persistent=False)
        for name in ROUTING:
            self.register_buffer(name, torch.empty(len(routed), shape.experts))

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Fill the buffers as a model has them that has seen nothing."""
        shape = self.shape
        with torch.device("cpu"):
            table = functional.rope_table(shape.sequence_length, shape.head_dim, self.rope_base)
        self.rope.copy_(table)
        self.expert_load.zero_()
        self.expert_share.fill_(1 / shape.experts)
        self.expert_bias.zero_()

    def routing_state(self) -> dict[str, Tensor]:
        """What routing has learned beside weights, equal on all workers after a step."""
        return {name: self.get_buffer(name) for name in ROUTING}

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Losses:
        """Mean losses over the batch; adds each MoE layer's loads to `expert_load`."""
        x, routed = self._stack(tokens_BT)
        objective, losses = self._head_loss(x, targets_BT, self.z_loss)
        for layer in routed:
            objective = objective + layer.loss
        if routed:
            self.expert_load += torch.stack([layer.load_E for layer in routed])
        return Losses(objective, losses.mean())

    @torch.no_grad()
    def evaluate(
        self, tokens_BT: Tensor, targets_BT: Tensor, count: int | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Mean cross-entropy of each of the first `count` sequences (all, if None), float32, and
        the routing of these if there is any."""
        count = len(tokens_BT) if count is None else count
        x, routed = self._stack(tokens_BT)
        _, losses = self._head_loss(x, targets_BT, 0.0)
        stats = None
        if routed:
            tokens = count * tokens_BT.shape[1]
            loads, confidence = [], []
            for layer in routed:
                chosen = layer.experts_NK[:tokens].flatten()
                loads.append(torch.bincount(chosen, minlength=self.shape.experts))
                assert layer.confidence_N is not None
                confidence.append(layer.confidence_N[:tokens].sum())
            stats = RouterStats(torch.stack(loads), torch.stack(confidence))
        return losses.mean(1)[:count], stats

    @torch.no_grad()
    def finish_step(self) -> None:
        """After a global batch, whose loads must have been summed over workers: rebalance.

        The loads become the shares that the next step's balance loss uses, or move the router
        bias (`moe.bias_motion`).
        """
        if not len(self.expert_load):
            return
        mean = self.expert_load.mean(1, keepdim=True)
        torch.div(self.expert_load, mean * self.shape.experts, out=self.expert_share)
        if self.settings.balance == "bias":
            self.expert_bias += moe.bias_motion(self.expert_load, self.shape, self.settings)
        self.expert_load.zero_()

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A block's function, as this model is to run it."""
        if self.compiled:
            function = compiled(function)
        elif fused.usable(arguments[0]):
            return HAND_WRITTEN[function](*arguments)
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is random.
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def _stack(self, tokens_BT: Tensor) -> tuple[Tensor, list[ExpertsOutput]]:
        """Embedding and all blocks."""
        x = F.embedding(tokens_BT, self.embedding)
        x = x if self.dtype is None else x.to(self.dtype)
        routed: list[ExpertsOutput] = []
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = attention(x, self.rope, self._run)
            if isinstance(feed_forward, Experts):
                row = len(routed)
                balance = self.expert_share[row], self.expert_bias[row]
                routed.append(feed_forward(x, *balance, self._run))
                x = routed[-1].x_BTD
            else:
                x = feed_forward(x, self._run)
        return x, routed

    def _head_loss(self, x_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        head = self.embedding.t() if self.head is None else self.head
        return self._run(functional.head_loss, x_BTD, self.norm, head, targets_BT, z_loss)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
