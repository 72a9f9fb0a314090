"""The mixture of experts as one autograd function: `moe.mix` for CPUs.

Rows are sorted by expert. In small layers one grouped product serves all experts. In large layers
experts are worked on one by one, which keeps activations in cache and lets oneDNN multiply; it
compiles a kernel for each number of rows, so these are padded to a multiple with rows of weight
zero. Shape suffixes: see `raysweep.model.functional`; R stands for the rows with padding.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from raysweep.model import moe
from raysweep.model.fused import matmul, matmul_of_transposed, swiglu_backward

ONE_BY_ONE_FROM = 1 << 22
"""Multiply-adds of an expert from which a layer counts as large."""
ROW_MULTIPLE = 64
"""Rows of an expert in large layers are a multiple of this."""


def mix(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, routing: moe.Routing
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each token's experts, and the experts' loads. No token is dropped."""
    n_experts, d_model, width = gate_up_EDF.shape
    top_k = routing.experts_NK.shape[1]
    order, ends = moe.dispatch(routing.experts_NK, n_experts)
    loads = moe.loads(ends)
    sizes = loads.tolist()
    large = len(order) * d_model * width > ONE_BY_ONE_FROM * n_experts
    if large:
        sizes = [-(-size // ROW_MULTIPLE) * ROW_MULTIPLE for size in sizes]

    # Where each pair's row lies, and for each row the pair it came from; padding takes pair 0.
    place = torch.arange(len(order))
    pair_R, real_R = order, None
    if sum(sizes) > len(order):
        padding = torch.tensor([0, *sizes]).cumsum(0)[:-1] - (ends - loads)
        place += padding.repeat_interleave(loads)
        pair_R, real_R = order.new_zeros(sum(sizes)), x_ND.new_zeros(sum(sizes))
        pair_R[place] = order
        real_R[place] = 1.0
    row_M = torch.empty_like(order)
    row_M[order] = place
    row_NK = row_M.view(-1, top_k)
    groups = _one_by_one(sizes) if large else [(slice(None), slice(None))]
    arguments = pair_R // top_k, pair_R, real_R, row_NK, ends, groups
    y = _Mix.apply(x_ND, routing.weights_NK, gate_up_EDF, down_EFD, *arguments)
    return y, loads  # type: ignore[return-value]


class _Mix(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        gate_up_EDF: Tensor,
        down_EFD: Tensor,
        token_R: Tensor,
        pair_R: Tensor,
        real_R: Tensor | None,
        row_NK: Tensor,
        ends_E: Tensor,
        groups: list[tuple[slice, slice | int]],
    ) -> Tensor:
        x_RD = x_ND.index_select(0, token_R)
        outputs, activations = [], []
        for rows, experts in groups:
            both = _product(x_RD[rows], gate_up_EDF[experts], ends_E)
            # Copies pay: elementwise kernels are slow on rows of odd width.
            gate, up = (half.contiguous() for half in both.chunk(2, 1))
            gated = F.silu(gate)
            hidden = gated * up
            outputs.append(_product(hidden, down_EFD[experts], ends_E))
            activations += [gate, up, gated, hidden]
        y_RD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        weight_R1 = weights_NK.flatten().index_select(0, pair_R)[:, None]
        if real_R is not None:
            weight_R1 *= real_R[:, None]
        indices = token_R, row_NK, ends_E
        ctx.save_for_backward(gate_up_EDF, down_EFD, weight_R1, x_RD, y_RD, *indices, *activations)
        ctx.groups = groups
        return _sum_of_pairs(y_RD, row_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate_up, down, weight_R1, x_RD, y_RD, token_R, row_NK, ends, *saved = ctx.saved_tensors
        dy_RD = grads[0].index_select(0, token_R)
        d_weight_R = torch.linalg.vecdot(dy_RD, y_RD)
        dy_RD *= weight_R1
        of_gate_up, of_down, of_x = [], [], []
        for i, (rows, experts) in enumerate(ctx.groups):
            gate, up, gated, hidden = saved[4 * i : 4 * i + 4]
            dy = dy_RD[rows]
            of_down.append(_gradient(hidden, dy, down[experts], ends))
            d_hidden = _product(dy, down[experts].mT, ends)
            d_both = torch.cat(swiglu_backward(d_hidden, gate, up, gated), 1)
            of_gate_up.append(_gradient(x_RD[rows], d_both, gate_up[experts], ends))
            of_x.append(_product(d_both, gate_up[experts].mT, ends))
        d_weights = d_weight_R.index_select(0, row_NK.flatten()).view_as(row_NK)
        if of_down[0].ndim == 3:
            return (_sum_of_pairs(of_x[0], row_NK), d_weights, of_gate_up[0], of_down[0]) + (
                None,
            ) * 6
        dx = _sum_of_pairs(torch.cat(of_x), row_NK)
        return (dx, d_weights, torch.stack(of_gate_up), torch.stack(of_down)) + (None,) * 6


def _one_by_one(sizes: list[int]) -> list[tuple[slice, slice | int]]:
    """Each expert's rows, and the expert."""
    ends = accumulate(sizes)
    return [
        (slice(end - size, end), e) for e, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]


def _product(x_RI: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Rows times the matrix of one expert, or of each row's expert if w is all of them."""
    if w.ndim == 2:
        return matmul(x_RI, w)
    if x_RI.dtype == torch.float64:  # which the grouped kernel lacks
        return moe.expert_loop(x_RI, w, ends_E)
    return F.grouped_mm(x_RI, w, offs=ends_E)


def _gradient(x_RI: Tensor, dy_RO: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Gradient of the matrix or matrices w of `_product`."""
    if w.ndim == 2:
        return matmul_of_transposed(x_RI, dy_RO)
    if x_RI.dtype == torch.float64:
        sizes = moe.loads(ends_E).tolist()
        parts = zip(x_RI.split(sizes), dy_RO.split(sizes), strict=True)
        return torch.stack([x.t() @ dy for x, dy in parts])
    return F.grouped_mm(x_RI.t(), dy_RO, offs=ends_E)


def _sum_of_pairs(y_RD: Tensor, row_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """Each token's sum, weighted or not, over its experts' rows."""
    total: Tensor | None = None
    for k, row_N in enumerate(row_NK.unbind(1)):
        y_ND = y_RD.index_select(0, row_N)
        if weights_NK is None:
            total = y_ND if total is None else total.add_(y_ND)
        elif total is None:
            total = y_ND.mul_(weights_NK[:, k : k + 1])
        else:
            total.addcmul_(y_ND, weights_NK[:, k : k + 1])
    assert total is not None
    return total
