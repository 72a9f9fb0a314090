"""The mixture of experts as one autograd function: `moe.mix` for CPUs.

Rows are sorted by expert and padded with rows of weight zero. In small layers they are padded so
that all experts have equally many, and one batched product serves all. In large layers experts are
worked on one by one, which keeps activations in cache; their rows are padded to a multiple, for
oneDNN compiles a kernel for each number of rows. Shape suffixes: see `raysweep.model.functional`;
R stands for the rows with padding.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
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
    sizes = _rows_per_expert(loads.tolist(), d_model * width)

    # Where each pair's row lies, and for each row the pair it came from; padding takes pair 0.
    padding = torch.tensor([0, *sizes]).cumsum(0)[:-1] - (ends - loads)
    place = torch.arange(len(order)) + padding.repeat_interleave(loads)
    pair_R = order.new_zeros(sum(sizes))
    pair_R[place] = order
    real_R = x_ND.new_zeros(sum(sizes))
    real_R[place] = 1.0
    row_M = torch.empty_like(order)
    row_M[order] = place
    arguments = pair_R // top_k, pair_R, real_R, row_M, sizes
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
        real_R: Tensor,
        row_M: Tensor,
        sizes: list[int],
    ) -> Tensor:
        weight_R1 = (weights_NK.flatten().index_select(0, pair_R) * real_R)[:, None]
        y_RD = x_ND.new_empty(len(token_R), x_ND.shape[1])
        activations = []
        for rows, experts in _groups(sizes):
            x = x_ND.index_select(0, token_R[rows])
            gate, up = (_product(x, w) for w in gate_up_EDF[experts].chunk(2, -1))
            gated = torch.nn.functional.silu(gate)
            hidden = gated * up
            weighted = hidden * weight_R1[rows]
            y_RD[rows] = _product(weighted, down_EFD[experts])
            activations += [x, gate, up, gated, hidden, weighted]
        ctx.save_for_backward(gate_up_EDF, down_EFD, weight_R1, token_R, row_M, *activations)
        ctx.sizes, ctx.top_k = sizes, weights_NK.shape[1]
        return _sum_of_pairs(y_RD, row_M, ctx.top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate_up, down, weight_R1, token_R, row_M, *activations = ctx.saved_tensors
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        dx_RD = grads[0].new_empty(len(token_R), grads[0].shape[1])
        d_weight_R = weight_R1.new_empty(len(token_R))
        for i, (rows, experts) in enumerate(_groups(ctx.sizes)):
            x, gate, up, gated, hidden, weighted = activations[6 * i : 6 * i + 6]
            dy = grads[0].index_select(0, token_R[rows])
            d_down[experts] = _gradient(weighted, dy, down[experts])
            d_weighted = _product(dy, down[experts].mT)
            d_weight_R[rows] = torch.linalg.vecdot(d_weighted, hidden)
            d_weighted.mul_(weight_R1[rows])
            d_gate, d_up = swiglu_backward(d_weighted, gate, up, gated)
            w_gate, w_up = gate_up[experts].chunk(2, -1)
            d_w = _gradient(x, d_gate, w_gate), _gradient(x, d_up, w_up)
            d_gate_up[experts] = torch.cat(d_w, -1)
            torch.add(_product(d_gate, w_gate.mT), _product(d_up, w_up.mT), out=dx_RD[rows])
        d_weights = d_weight_R.index_select(0, row_M).view(-1, ctx.top_k)
        dx = _sum_of_pairs(dx_RD, row_M, ctx.top_k)
        return dx, d_weights, d_gate_up, d_down, None, None, None, None, None


def _rows_per_expert(loads: list[int], work_a_row: int) -> list[int]:
    """Rows with padding. `work_a_row` are the multiply-adds of a row in the larger product."""
    pairs, n_experts = sum(loads), len(loads)
    if pairs * work_a_row > ONE_BY_ONE_FROM * n_experts:
        return [-(-load // ROW_MULTIPLE) * ROW_MULTIPLE for load in loads]
    equal = max(loads)
    return [equal] * n_experts if equal * n_experts <= 2 * pairs else loads


def _groups(sizes: list[int]) -> list[tuple[slice, slice | int]]:
    """Rows and experts worked on together: all if they have equally many rows, else one by one."""
    if len(set(sizes)) == 1:
        return [(slice(0, sum(sizes)), slice(None))]
    ends = list(accumulate(sizes))
    return [
        (slice(end - size, end), e) for e, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]


def _product(x_RI: Tensor, w: Tensor) -> Tensor:
    """Rows times the matrix of their expert, or of each of several experts with as many rows."""
    if w.ndim == 2:
        return matmul(x_RI, w)
    return torch.bmm(x_RI.view(len(w), -1, x_RI.shape[1]), w).flatten(0, 1)


def _gradient(x_RI: Tensor, dy_RO: Tensor, w: Tensor) -> Tensor:
    """Gradient of the matrix or matrices w of `_product`."""
    if w.ndim == 2:
        return matmul_of_transposed(x_RI, dy_RO)
    x, dy = (t.view(len(w), -1, t.shape[1]) for t in (x_RI, dy_RO))
    return torch.bmm(x.mT, dy)


def _sum_of_pairs(y_RD: Tensor, row_M: Tensor, top_k: int) -> Tensor:
    """Each token's sum over its experts."""
    y_MD = y_RD.index_select(0, row_M)
    return y_MD if top_k == 1 else y_MD.unflatten(0, (-1, top_k)).sum(1)
