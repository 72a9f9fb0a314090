"""The mixture of experts as one autograd function: `moe.mix` for CPUs.

Rows are sorted by expert. In small layers one grouped product serves all experts. In large layers
experts are worked on one by one, which keeps activations in cache and lets oneDNN multiply; it
compiles a kernel for each number of rows, so these are padded to a multiple with rows of weight
zero. Shape suffixes: see `raysweep.model.functional`; R stands for the rows with padding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from raysweep.model import moe
from raysweep.model.fused import (
    linear,
    matmul,
    matmul_of_transposed,
    rms_norm,
    swiglu_backward,
)

ONE_BY_ONE_FROM = 1 << 22
"""Multiply-adds of an expert from which a layer counts as large."""
ROW_MULTIPLE = 64
"""Rows of an expert in large layers are a multiple of this."""


def mix(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, routing: moe.Routing
) -> tuple[Tensor, Tensor]:
    """Weighted sum of each token's experts, and the experts' loads. No token is dropped."""
    n_experts, d_model, width = gate_up_EDF.shape
    large = routing.experts_NK.numel() * d_model * width > ONE_BY_ONE_FROM * n_experts
    rows = _Rows(routing.experts_NK, n_experts, ROW_MULTIPLE if large else 1)
    y = _Mix.apply(x_ND, routing.weights_NK, gate_up_EDF, down_EFD, rows, large)
    return y, rows.loads_E  # type: ignore[return-value]


def experts_block(
    x_BTD: Tensor, norm: Tensor, router: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x + experts(norm(x)), and what else `moe.experts_block` gives."""
    h = rms_norm(x_BTD, norm)
    y, *routed = moe.experts(h, linear(h.flatten(0, 1), router), *rest, mix=mix)
    return x_BTD + y, *routed  # type: ignore[return-value]


class _Rows:
    """Pairs (token k) sorted by expert, each expert's rows padded to a multiple.

    In NumPy, which sorts the short integers by radix and has less to do for each small operation.
    """

    def __init__(self, experts_NK: Tensor, n_experts: int, multiple: int) -> None:
        experts = experts_NK.numpy()
        order = np.argsort(experts.reshape(-1).astype(np.uint16), kind="stable")
        loads = np.bincount(experts.reshape(-1), minlength=n_experts)
        sizes = -(-loads // multiple) * multiple
        ends = sizes.cumsum()
        place, pair, real = np.arange(len(order)), order, None
        if ends[-1] > len(order):
            place += np.repeat(ends - sizes - (loads.cumsum() - loads), loads)
            pair, real = np.zeros(ends[-1], np.int64), np.zeros(ends[-1], np.float32)
            pair[place], real[place] = order, 1.0
        row = np.empty_like(order)
        row[order] = place
        self.loads_E = torch.from_numpy(loads.astype(np.int32))
        self.ends_E = torch.from_numpy(ends.astype(np.int32))
        self.pair_R = torch.from_numpy(pair)
        """The pair in each row; 0 in padding."""
        self.token_R = torch.from_numpy(pair // experts.shape[1])
        self.real_R = None if real is None else torch.from_numpy(real)
        """1 where there is a pair and 0 in padding; None without padding."""
        self.row_NK = torch.from_numpy(row.reshape(experts.shape))
        """Where each pair's row lies."""

    def of_each_expert(self) -> list[tuple[slice, int]]:
        """Each expert's rows, and the expert."""
        ends = self.ends_E.tolist()
        return [(slice(a, b), e) for e, (a, b) in enumerate(pairwise([0, *ends]))]


class _Mix(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        gate_up_EDF: Tensor,
        down_EFD: Tensor,
        rows: _Rows,
        large: bool,
    ) -> Tensor:
        x_RD = x_ND.index_select(0, rows.token_R)
        groups = rows.of_each_expert() if large else [(slice(None), slice(None))]
        outputs, activations = [], []
        for part, experts in groups:
            both = _product(x_RD[part], gate_up_EDF[experts], rows.ends_E)
            # Copies pay: elementwise kernels are slow on rows of odd width.
            gate, up = (half.contiguous() for half in both.chunk(2, 1))
            gated = F.silu(gate)
            hidden = gated * up
            outputs.append(_product(hidden, down_EFD[experts], rows.ends_E))
            activations += [gate, up, gated, hidden]
        y_RD = _joined(outputs)
        weight_R1 = weights_NK.reshape(-1).index_select(0, rows.pair_R)[:, None]
        if rows.real_R is not None:
            weight_R1 *= rows.real_R[:, None]
        ctx.save_for_backward(gate_up_EDF, down_EFD, weight_R1, x_RD, y_RD, *activations)
        ctx.rows, ctx.groups = rows, groups
        return _sum_of_pairs(y_RD, rows.row_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate_up, down, weight_R1, x_RD, y_RD, *saved = ctx.saved_tensors
        rows, ends = ctx.rows, ctx.rows.ends_E
        dy_RD = grads[0].index_select(0, rows.token_R)
        d_weight_R = torch.linalg.vecdot(dy_RD, y_RD)
        dy_RD *= weight_R1
        of_gate_up, of_down, of_x = [], [], []
        tallest, width = max(len(gate) for gate in saved[::4]), saved[0].shape[1]
        space = x_RD.new_empty(tallest, 2 * width)
        for i, (part, experts) in enumerate(ctx.groups):
            gate, up, gated, hidden = saved[4 * i : 4 * i + 4]
            dy = dy_RD[part]
            of_down.append(_gradient(hidden, dy, down[experts], ends))
            d_hidden = _product(dy, down[experts].mT, ends)
            d_both = swiglu_backward(d_hidden, gate, up, gated, space[: len(dy)])
            of_gate_up.append(_gradient(x_RD[part], d_both, gate_up[experts], ends))
            of_x.append(_product(d_both, gate_up[experts].mT, ends))
        dx = _sum_of_pairs(_joined(of_x), rows.row_NK)
        d_weights = d_weight_R.index_select(0, rows.row_NK.flatten()).view_as(rows.row_NK)
        of_weights = (g[0] if g[0].ndim == 3 else torch.stack(g) for g in (of_gate_up, of_down))
        return dx, d_weights, *of_weights, None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
