"""The mixture of experts as one autograd function: `moe.mix` for CPUs.

Rows are sorted by expert and padded with rows of weight zero: in small layers so that all experts
have equally many and one batched product serves them, in large ones so that oneDNN, which compiles
a kernel for each number of rows, sees few of them. Shape suffixes: see `raysweep.model.functional`;
R stands for the rows with padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from raysweep.model import moe
from raysweep.model.fused import ONEDNN_FROM, matmul, matmul_of_transposed, swiglu_backward

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
        x_RD = x_ND.index_select(0, token_R)
        weight_R1 = (weights_NK.flatten().index_select(0, pair_R) * real_R)[:, None]
        both = _each(x_RD, gate_up_EDF, sizes)
        gate, up = both.chunk(2, 1)
        gated = torch.nn.functional.silu(gate)
        hidden = gated * up
        weighted = hidden * weight_R1
        y_RD = _each(weighted, down_EFD, sizes)
        activations = x_RD, weight_R1, both, gated, hidden, weighted
        ctx.save_for_backward(gate_up_EDF, down_EFD, *activations, token_R, row_M)
        ctx.sizes, ctx.top_k = sizes, weights_NK.shape[1]
        return _sum_of_pairs(y_RD, row_M, ctx.top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate_up, down, *activations, token_R, row_M = ctx.saved_tensors
        x_RD, weight_R1, both, gated, hidden, weighted = activations
        sizes = ctx.sizes
        dy_RD = grads[0].index_select(0, token_R)
        d_down = _each_gradient(weighted, dy_RD, sizes)
        d_weighted = _each(dy_RD, down.transpose(1, 2), sizes)
        d_weight_R = torch.linalg.vecdot(d_weighted, hidden)
        d_weights = d_weight_R.index_select(0, row_M).view(-1, ctx.top_k)
        d_both = swiglu_backward(d_weighted.mul_(weight_R1), both, gated)
        d_gate_up = _each_gradient(x_RD, d_both, sizes)
        dx_RD = _each(d_both, gate_up.transpose(1, 2), sizes)
        dx = _sum_of_pairs(dx_RD, row_M, ctx.top_k)
        return dx, d_weights, d_gate_up, d_down, None, None, None, None, None


def _rows_per_expert(loads: list[int], work_a_row: int) -> list[int]:
    """Rows with padding. `work_a_row` are the multiply-adds of a row in the larger product."""
    pairs, n_experts = sum(loads), len(loads)
    if pairs * work_a_row > ONEDNN_FROM * n_experts:
        return [-(-load // ROW_MULTIPLE) * ROW_MULTIPLE for load in loads]
    equal = max(loads)
    return [equal] * n_experts if equal * n_experts <= 2 * pairs else loads


def _each(x_RI: Tensor, w_EIO: Tensor, sizes: list[int]) -> Tensor:
    """Each expert's rows times its matrix."""
    if len(set(sizes)) == 1:
        return torch.bmm(x_RI.view(len(sizes), -1, x_RI.shape[1]), w_EIO).flatten(0, 1)
    parts = zip(x_RI.split(sizes), w_EIO.unbind(0), strict=True)
    return torch.cat([matmul(x, w) for x, w in parts])


def _each_gradient(x_RI: Tensor, dy_RO: Tensor, sizes: list[int]) -> Tensor:
    """Each expert's x.t() @ dy."""
    if len(set(sizes)) == 1:
        x, dy = (t.view(len(sizes), -1, t.shape[1]) for t in (x_RI, dy_RO))
        return torch.bmm(x.transpose(1, 2), dy)
    parts = zip(x_RI.split(sizes), dy_RO.split(sizes), strict=True)
    return torch.stack([matmul_of_transposed(x, dy) for x, dy in parts])


def _sum_of_pairs(y_RD: Tensor, row_M: Tensor, top_k: int) -> Tensor:
    """Each token's sum over its experts."""
    y_MD = y_RD.index_select(0, row_M)
    return y_MD if top_k == 1 else y_MD.unflatten(0, (-1, top_k)).sum(1)
