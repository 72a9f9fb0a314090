"""The decoder's blocks in plain differentiable PyTorch: what GPUs compile, and the reference.

Each block is a function of tensors and numbers alone, so that one compiled graph serves all layers
of a shape in all models of a process. Activations have one dtype, in which products are computed:
weights are rounded to it where they are used. Norms, rotations and losses are computed in float32
at least.

Shape suffixes here and in the rest of the package: B sequences, T positions, N = B T tokens,
D d_model, H heads, G key-value heads, C head size, F feed-forward width, V vocabulary, E experts,
K experts a token, M = N K token-expert pairs, S shared experts. Weights are stored (in, out).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def widen(x: Tensor) -> Tensor:
    """The tensor in float32; one of float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / rms(x) * gain over the last dimension, in float32 at least (Zhang & Sennrich 2019)."""
    wide = widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return (wide * scale * gain.to(x.dtype)).to(x.dtype)


def rope_table(length: int, head_dim: int, base: float) -> Tensor:
    """Angles of rotary embeddings as (cos, sin), float64 (T, C/2, 2) (Su et al. 2021)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], -1)


def apply_rope(x_BTHC: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels by the position's angles."""
    even, odd = widen(x_BTHC).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[: x_BTHC.shape[1], None].to(even.dtype).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x_BTHC.dtype)


def attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """Causal softmax attention; each key-value head serves H / G query heads. -> (B, T, H C)."""
    grouped = q_BTHC.shape[2] != k_BTGC.shape[2]
    out = F.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BTGC.transpose(1, 2),
        v_BTGC.transpose(1, 2),
        is_causal=True,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2).flatten(2)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def attention_block(
    x_BTD: Tensor,
    norm: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    out: Tensor,
    rope: Tensor,
    kv_heads: int,
) -> Tensor:
    """x + attention(norm(x)) with optional QK-norm and rotary embeddings."""
    dtype, head_dim = x_BTD.dtype, 2 * rope.shape[1]
    heads = out.shape[0] // head_dim
    projected = rms_norm(x_BTD, norm) @ qkv.to(dtype)
    q, k, v = projected.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], -2)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)
    return x_BTD + attention(apply_rope(q, rope), apply_rope(k, rope), v) @ out.to(dtype)


def feed_forward_block(x_BTD: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x + swiglu(norm(x))."""
    hidden = swiglu(rms_norm(x_BTD, norm) @ gate_up.to(x_BTD.dtype))
    return x_BTD + hidden @ down.to(x_BTD.dtype)


def head_loss(
    x_BTD: Tensor, norm: Tensor, head_DV: Tensor, targets_BT: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy plus z-loss of the logits norm(x) @ head, and each token's cross-entropy
    (B, T) without gradient; in float32 at least. The z-loss is `z_loss` times the mean square of
    the log-normaliser (PaLM, arXiv 2204.02311)."""
    logits = widen(rms_norm(x_BTD, norm) @ head_DV.to(x_BTD.dtype))
    normaliser = torch.logsumexp(logits, -1)
    losses = normaliser - _of_target(logits, targets_BT)
    objective = losses.mean()
    if z_loss:
        objective = objective + z_loss * normaliser.square().mean()
    return objective, losses.detach()


def _of_target(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Each token's logit of its target. Compiled, a comparison becomes part of the sums beside it;
    the gradient of `gather` would be written out in float32, as large as all logits."""
    if not torch.compiler.is_compiling():
        return logits_BTV.gather(-1, targets_BT[..., None]).squeeze(-1)
    tokens = torch.arange(logits_BTV.shape[-1], device=logits_BTV.device)
    return torch.where(tokens == targets_BT[..., None], logits_BTV, 0.0).sum(-1)
