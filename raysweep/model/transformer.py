"""A decoder-only transformer, dense or mixture of experts, built from a `ModelShape`.

Pre-norm blocks of causal attention with rotary embeddings and a SwiGLU feed-forward or a mixture
of SwiGLU experts; no biases. Shape suffixes: see `raysweep.model.functional`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.model import functional, fused, fused_attention, fused_experts, fused_router, moe
from raysweep.study.cells import Architecture
from raysweep.study.shape import ModelShape


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
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        d, width = shape.d_model, shape.heads * shape.head_dim
        self.norm = _gain(d)
        self.qkv = _weight(d, width + 2 * shape.kv_heads * shape.head_dim)
        self.q_norm = _gain(shape.head_dim) if shape.qk_norm else None
        self.k_norm = _gain(shape.head_dim) if shape.qk_norm else None
        self.out = _weight(width, d)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        if fused.usable(x_BTD):
            norms = self.norm, self.qkv, self.q_norm, self.k_norm
            return fused_attention.attention_block(x_BTD, *norms, self.out, rope, self.kv_heads)
        h = functional.rms_norm(x_BTD, self.norm)
        qkv = (h @ self.qkv).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], -2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = functional.rms_norm(q, self.q_norm), functional.rms_norm(k, self.k_norm)
        q, k = functional.apply_rope(q, rope), functional.apply_rope(k, rope)
        return x_BTD + functional.attention(q, k, v) @ self.out


class FeedForward(nn.Module):
    """Norm and SwiGLU; added to x."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = _gain(shape.d_model)
        self.gate_up = _weight(shape.d_model, 2 * shape.d_ff)
        self.down = _weight(shape.d_ff, shape.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if fused.usable(x_BTD):
            return fused.feed_forward_block(x_BTD, self.norm, self.gate_up, self.down)
        h = functional.rms_norm(x_BTD, self.norm)
        return x_BTD + functional.swiglu(h @ self.gate_up) @ self.down


class ExpertsOutput(NamedTuple):
    x_BTD: Tensor
    routing: moe.Routing
    load_E: Tensor


class Experts(nn.Module):
    """Norm, router, routed and shared experts; added to x."""

    def __init__(self, shape: ModelShape, settings: Architecture) -> None:
        super().__init__()
        self.settings, self.top_k = settings, shape.top_k
        d, width, shared = shape.d_model, shape.expert_ff, shape.shared_experts * shape.expert_ff
        self.norm = _gain(d)
        self.router = _weight(d, shape.experts)
        self.gate_up = _weight(shape.experts, d, 2 * width)
        self.down = _weight(shape.experts, width, d)
        # Shared experts see every token, so together they are one wide SwiGLU.
        self.shared_gate_up = _weight(d, 2 * shared) if shared else None
        self.shared_down = _weight(shared, d) if shared else None

    def forward(self, x_BTD: Tensor, share_E: Tensor, bias_E: Tensor) -> ExpertsOutput:
        if fused.usable(x_BTD):
            h = fused.rms_norm(x_BTD, self.norm).flatten(0, 1)
            logits, route, mix = fused.linear(h, self.router), fused_router.route, fused_experts.mix
        else:
            h = functional.rms_norm(x_BTD, self.norm).flatten(0, 1)
            with torch.autocast(h.device.type, enabled=False):
                logits, route, mix = h.to(self.router.dtype) @ self.router, moe.route, moe.mix
        routing = route(logits, self.top_k, share_E, bias_E, self.settings)
        dtype = _matmul_dtype(h)
        y, load = mix(h.to(dtype), self.gate_up.to(dtype), self.down.to(dtype), routing)
        if self.shared_gate_up is not None and self.shared_down is not None:
            y = y + functional.swiglu(h @ self.shared_gate_up) @ self.shared_down
        return ExpertsOutput(x_BTD + y.view_as(x_BTD), routing, load)


class Decoder(nn.Module):
    """Tokens in, losses out. Built by `raysweep.model.build`."""

    rope: Tensor
    expert_load: Tensor
    expert_share: Tensor
    expert_bias: Tensor

    def __init__(
        self, shape: ModelShape, settings: Architecture, *, rope_base: float, z_loss: float
    ) -> None:
        super().__init__()
        self.shape, self.settings, self.z_loss = shape, settings, z_loss
        self.embedding = _weight(shape.vocab_size, shape.d_model)
        self.attention = nn.ModuleList(Attention(shape) for _ in range(shape.layers))
        routed = set(shape.moe_layers) if shape.is_moe else set()
        self.feed_forward = nn.ModuleList(
            Experts(shape, settings) if i in routed else FeedForward(shape)
            for i in range(shape.layers)
        )
        self.norm = _gain(shape.d_model)
        self.head = None if shape.tie_embeddings else _weight(shape.d_model, shape.vocab_size)

        table = functional.rope_table(shape.sequence_length, shape.head_dim, rope_base)
        self.register_buffer("rope", table.float(), persistent=False)
        per_expert = torch.zeros(len(routed), shape.experts)
        self.register_buffer("expert_load", per_expert.clone())
        self.register_buffer("expert_share", per_expert + 1 / shape.experts)
        self.register_buffer("expert_bias", per_expert.clone())

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Losses:
        """Mean losses over the batch; adds each MoE layer's loads to `expert_load`."""
        x, routed = self._trunk(tokens_BT)
        objective, losses = self._head_loss(x, targets_BT, self.z_loss)
        for row, layer in enumerate(routed):
            objective = objective + layer.routing.loss
            self.expert_load[row] += layer.load_E
        return Losses(objective, losses.mean())

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, RouterStats | None]:
        """Mean cross-entropy of each sequence (B,), float32, and the routing if there is any."""
        x, routed = self._trunk(tokens_BT)
        _, losses = self._head_loss(x, targets_BT, 0.0)
        stats = None
        if routed:
            load = torch.stack([layer.load_E for layer in routed])
            stats = RouterStats(load, torch.stack([layer.routing.confidence() for layer in routed]))
        return losses.mean(1), stats

    @torch.no_grad()
    def finish_step(self) -> None:
        """After a global batch, whose loads must have been summed over workers: rebalance.

        The loads become the shares that the next step's balance loss uses, or move the router
        bias by `BIAS_STEP` towards experts that got less than the mean.
        """
        if not len(self.expert_load):
            return
        mean = self.expert_load.mean(1, keepdim=True)
        torch.div(self.expert_load, mean * self.shape.experts, out=self.expert_share)
        if self.settings.balance == "bias":
            self.expert_bias += moe.BIAS_STEP * torch.sign(mean - self.expert_load)
        self.expert_load.zero_()

    def _trunk(self, tokens_BT: Tensor) -> tuple[Tensor, list[ExpertsOutput]]:
        x = F.embedding(tokens_BT, self.embedding)
        routed: list[ExpertsOutput] = []
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = attention(x, self.rope)
            if isinstance(feed_forward, Experts):
                row = len(routed)
                routed.append(feed_forward(x, self.expert_share[row], self.expert_bias[row]))
                x = routed[-1].x_BTD
            else:
                x = feed_forward(x)
        return x, routed

    def _head_loss(self, x_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        head = self.embedding.t() if self.head is None else self.head
        head_loss = fused.head_loss if fused.usable(x_BTD) else functional.head_loss
        return head_loss(x_BTD, self.norm, head, targets_BT, z_loss)


@torch.no_grad()
def initialise(model: Decoder, *, init_std: float | None, seed: int) -> None:
    """Gaussian weights from a generator of their own, in a fixed order; gains of one.

    The standard deviation is `init_std`, or 1/sqrt(fan-in) of each matrix. Projections that write
    to the residual stream are scaled down by 1/sqrt(2 layers) (GPT-2). An untied embedding has
    standard deviation 1 (its fan-in is one token), a tied one 1/sqrt(d_model), for the head's sake.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = model.shape
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        fan_in = shape.d_model if shape.tie_embeddings else 1
        if name != "embedding":
            fan_in = parameter.shape[-2]
        std = init_std if init_std is not None else 1 / math.sqrt(fan_in)
        if name.endswith((".out", "down")):
            std /= math.sqrt(2 * shape.layers)
        noise = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        parameter.copy_(noise)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def _gain(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


def _matmul_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
