"""Whole blocks of the decoder with hand-written backward passes: fast on CPUs.

Small models on a CPU spend their time in many small operations and in reading and writing
activations. Each block here is one autograd function that works in place, folds norm gains into the
next matrix, keeps heads contiguous, and skips the masked half of causal attention. Values and
gradients equal those of the plain code in `functional` and `transformer`, which tests check.

Attention has its own module, `fused_attention`, and so have experts, `fused_experts`. Shape
suffixes: see `raysweep.model.functional`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from raysweep.model.functional import NORM_EPS

ONEDNN_FROM = 1 << 20
"""Multiply-adds from which oneDNN's product is faster than BLAS despite its cost a call."""
ONEDNN_GRADIENT_FROM = 1 << 12
"""Elements of a weight from which its gradient pays for the copy that oneDNN makes."""
LOGITS_IN_CACHE = 1 << 18
NARROW = 16
"""BLAS is slow at products with fewer columns than this; it gets the transposed product."""


def usable(x: Tensor) -> bool:
    """Whether to take these functions: on CPUs, in full precision, not while compiling."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x_NI: Tensor, w_IO: Tensor) -> Tensor:
    """x @ w with the products of this module, in both directions."""
    return _Linear.apply(x_NI, w_IO)  # type: ignore[return-value]


def matmul(x_NI: Tensor, w_IO: Tensor) -> Tensor:
    """x @ w. oneDNN is about twice as fast as MKL on AMD processors, and no slower elsewhere."""
    if w_IO.shape[1] < NARROW:
        return (w_IO.t() @ x_NI.t()).t()
    if x_NI.shape[0] * w_IO.numel() < ONEDNN_FROM or not _onednn_takes(x_NI):
        return x_NI @ w_IO
    return _onednn(x_NI, w_IO)


def matmul_of_transposed(x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """x.t() @ y, the gradient of a weight: of the two, oneDNN copies the narrower."""
    if y_NO.shape[1] < NARROW:
        return (y_NO.t() @ x_NI).t()
    out = x_NI.shape[1] * y_NO.shape[1]
    if out < ONEDNN_GRADIENT_FROM or len(x_NI) * out < ONEDNN_FROM or not _onednn_takes(x_NI):
        return x_NI.t() @ y_NO
    if x_NI.shape[1] <= y_NO.shape[1]:
        return _onednn(x_NI.t(), y_NO)
    return _onednn(y_NO.t(), x_NI).t()


def _onednn(x_NI: Tensor, w_IO: Tensor) -> Tensor:
    # Of matrices with gaps between rows oneDNN makes a product a hundred times as slow.
    x, w = (
        m if m.is_contiguous() or m.t().is_contiguous() else m.contiguous() for m in (x_NI, w_IO)
    )
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), None, "none", [], "")


def _onednn_takes(x: Tensor) -> bool:
    return x.dtype == torch.float32 and _has_onednn()


def feed_forward_block(x_BTD: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x + swiglu(norm(x)), as `transformer.FeedForward` has it."""
    return _FeedForwardBlock.apply(x_BTD, norm, gate_up, down)  # type: ignore[return-value]


def head_loss(
    x_BTD: Tensor, norm: Tensor, head_DV: Tensor, targets_BT: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy plus z-loss of the logits norm(x) @ head; and each token's
    cross-entropy (B, T), without gradient."""
    return _HeadLoss.apply(x_BTD, norm, head_DV, targets_BT, z_loss)  # type: ignore[return-value]


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / rms(x) * gain, as `functional.rms_norm` has it."""
    return _RMSNorm.apply(x, gain)  # type: ignore[return-value]


class _FeedForwardBlock(Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        unit, scale = normalise(x)
        folded = norm[:, None] * gate_up
        # Two products rather than one with two halves: elementwise kernels are several times as
        # fast on contiguous numbers as on rows whose width is no multiple of their vectors.
        gate, up = (matmul(unit, w) for w in folded.chunk(2, 1))
        gated = torch.nn.functional.silu(gate)
        hidden = gated * up
        ctx.save_for_backward(norm, gate_up, down, unit, scale, folded, gate, up, gated, hidden)
        return x_BTD + matmul(hidden, down).view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        norm, gate_up, down, unit, scale, folded, gate, up, gated, hidden = ctx.saved_tensors
        dy = grads[0].reshape(len(unit), -1)
        d_down = matmul_of_transposed(hidden, dy)
        # Here one product of twice the width pays for the copy that joins its halves.
        d_both = swiglu_backward(matmul(dy, down.t()), gate, up, gated)
        d_folded = matmul_of_transposed(unit, d_both)
        d_norm = (d_folded * gate_up).sum(1)
        d_gate_up = d_folded.mul_(norm[:, None])
        d_unit = matmul(d_both, folded.t())
        dx = torch.addcmul(dy, project_out(d_unit, unit), scale)
        return dx.view_as(grads[0]), d_norm, d_gate_up, d_down


class _HeadLoss(Function):
    """Gradients are made in the forward pass, a few rows at a time, while the logits are near."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, norm: Tensor, head_DV: Tensor, targets_BT: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        targets = targets_BT.reshape(-1, 1)
        unit, scale = normalise(x)
        folded = norm[:, None] * head_DV
        need = any(ctx.needs_input_grad)
        losses = x.new_empty(len(x), 1)
        d_folded = torch.zeros_like(folded) if need else None
        d_unit = torch.empty_like(unit) if need else None
        z_sum = x.new_zeros(())
        rows = max(64, LOGITS_IN_CACHE // folded.shape[1])
        smallest = torch.finfo(x.dtype).tiny
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            logits = matmul(unit[part], folded)
            probs = torch.softmax(logits, -1)
            losses[part] = -probs.gather(1, targets[part]).clamp_min(smallest).log()
            normaliser = None
            if z_loss:
                normaliser = logits.gather(1, targets[part]) + losses[part]
                z_sum += normaliser.square().sum()
            if d_folded is None or d_unit is None:
                continue
            d_logits = probs if normaliser is None else probs * (1 + 2 * z_loss * normaliser)
            d_logits.scatter_add_(1, targets[part], -torch.ones_like(losses[part]))
            d_folded += matmul_of_transposed(unit[part], d_logits)
            d_unit[part] = matmul(d_logits, folded.t())
        if d_unit is not None:
            ctx.save_for_backward(norm, head_DV, unit, scale, d_folded, d_unit)
            ctx.shape = x_BTD.shape
        token_losses = losses.view_as(targets_BT)
        ctx.mark_non_differentiable(token_losses)
        objective = losses.mean()
        if z_loss:
            objective = objective + z_loss * z_sum / len(x)
        return objective, token_losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        norm, head, unit, scale, d_folded, d_unit = ctx.saved_tensors
        share = grads[0] / len(unit)
        d_folded = d_folded * share
        d_norm = (d_folded * head).sum(1)
        dx = project_out(d_unit * share, unit).mul_(scale)
        return dx.view(ctx.shape), d_norm, d_folded.mul_(norm[:, None]), None, None


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_IO: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, w_IO)
        return matmul(x_NI, w_IO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_NI, w_IO = ctx.saved_tensors
        return matmul(grads[0], w_IO.t()), matmul_of_transposed(x_NI, grads[0])


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        unit, scale = normalise(x)
        ctx.save_for_backward(unit, scale, gain)
        return unit * gain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        unit, scale, gain = ctx.saved_tensors
        d_gain = (grads[0] * unit).flatten(0, -2).sum(0)
        return project_out(grads[0] * gain, unit).mul_(scale), d_gain


def swiglu_backward(
    d_hidden: Tensor, gate: Tensor, up: Tensor, gated: Tensor, out: Tensor | None = None
) -> Tensor:
    """Gradients of gate and up, side by side and in `out` if given, from that of silu(gate) * up,
    which is overwritten."""
    d_up = d_hidden * gated
    d_gate = d_hidden.mul_(up)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return torch.cat((d_gate, d_up), 1, out=out)


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / rms(x) over the last dimension, and 1 / rms(x) with that dimension kept."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = scale.square_().mul_(1 / x.shape[-1]).add_(NORM_EPS).rsqrt_()
    return x * scale, scale


def project_out(d_unit: Tensor, unit: Tensor) -> Tensor:
    """d_unit less its part along `unit`, in place: with 1 / rms(x) times it, the gradient of x."""
    along = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1)
    return d_unit.addcmul_(unit, along, value=-1 / unit.shape[-1])


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
