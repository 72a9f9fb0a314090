"""Causal attention as one autograd function: heads contiguous, the masked half mostly skipped.

Shape suffixes: see `raysweep.model.functional`. L stands for all heads, queries' and keys'.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from raysweep.model.fused import NARROW, matmul, matmul_of_transposed, normalise, project_out

SCORES_IN_CACHE = 1 << 18
"""Attention scores worked on at a time, in elements: 1 MiB."""
QUERY_BLOCK = 32
"""Queries that share one range of keys: keys after the block are never looked at."""
ONE_BLOCK_UPTO = 1 << 17
"""Attention of no more scores than this is not cut: the calls would cost more than they save."""


def attention_block(*block: Any) -> Tensor:
    """x + attention(norm(x)), of the arguments of `functional.attention_block`."""
    return _AttentionBlock.apply(*block)  # type: ignore[return-value]


class _AttentionBlock(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        norm: Tensor,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        out: Tensor,
        rope: Tensor,
        kv_heads: int,
    ) -> Tensor:
        n_batch, length, d_model = x_BTD.shape
        head_dim = 2 * rope.shape[1]
        heads = out.shape[0] // head_dim
        x = x_BTD.reshape(-1, d_model)
        unit, scale = normalise(x)
        folded = norm[:, None] * qkv
        projected = matmul(unit, folded).view(n_batch, length, -1, head_dim)
        all_LBTC = projected.permute(2, 0, 1, 3).contiguous()
        qk, v = all_LBTC[: heads + kv_heads], all_LBTC[heads + kv_heads :]
        qk_unit = qk_scale = None
        if q_norm is not None and k_norm is not None:
            qk_unit, qk_scale = normalise(qk)
            qk = torch.empty_like(qk)
            torch.mul(qk_unit[:heads], q_norm / math.sqrt(head_dim), out=qk[:heads])
            torch.mul(qk_unit[heads:], k_norm, out=qk[heads:])
        else:
            qk[:heads] /= math.sqrt(head_dim)
        turn = _turns(rope, x.dtype, length)
        _as_complex(qk).mul_(turn)

        q, k = qk[:heads], qk[heads:]
        o_HBTC, probs = _attend(q, _repeat(k, heads), _repeat(v, heads))
        o_ND = o_HBTC.permute(1, 2, 0, 3).reshape(len(x), -1)
        weights = norm, qkv, q_norm, k_norm, out
        ctx.save_for_backward(
            *weights, unit, scale, folded, qk_unit, qk_scale, turn, q, k, v, o_ND, *probs
        )
        return x_BTD + matmul(o_ND, out).view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        norm, qkv, q_norm, k_norm, out, *saved = ctx.saved_tensors
        unit, scale, folded, qk_unit, qk_scale, turn, q, k, v, o_ND, *probs = saved
        (heads, n_batch, length, head_dim), kv_heads = q.shape, len(k)
        dy = grads[0].reshape(len(unit), -1)
        d_out = matmul_of_transposed(o_ND, dy)
        do_BTHC = matmul(dy, out.t()).view(n_batch, length, heads, head_dim)
        do = do_BTHC.permute(2, 0, 1, 3).contiguous()

        d_all = q.new_empty(heads + 2 * kv_heads, n_batch, length, head_dim)
        dq, dk, dv = d_all.split([heads, kv_heads, kv_heads])
        if heads == kv_heads:
            _attend_backward(do, q, k, v, probs, dq, dk, dv)
        else:
            wide_k, wide_v = torch.empty_like(q), torch.empty_like(q)
            _attend_backward(do, q, _repeat(k, heads), _repeat(v, heads), probs, dq, wide_k, wide_v)
            torch.sum(wide_k.unflatten(0, (kv_heads, -1)), 1, out=dk)
            torch.sum(wide_v.unflatten(0, (kv_heads, -1)), 1, out=dv)
        d_qk = d_all[: heads + kv_heads]
        _as_complex(d_qk).mul_(turn.conj())
        dq /= math.sqrt(head_dim)
        d_q_norm = d_k_norm = None
        if qk_unit is not None:
            d_gain = (d_qk * qk_unit).sum((1, 2))
            d_q_norm, d_k_norm = d_gain[:heads].sum(0), d_gain[heads:].sum(0)
            dq *= q_norm
            dk *= k_norm
            torch.mul(project_out(d_qk, qk_unit), qk_scale, out=d_qk)
        d_projected = d_all.permute(1, 2, 0, 3).reshape(len(unit), -1)
        d_folded = matmul_of_transposed(unit, d_projected)
        d_norm = (d_folded * qkv).sum(1)
        d_qkv = d_folded.mul_(norm[:, None])
        dx = torch.addcmul(dy, project_out(matmul(d_projected, folded.t()), unit), scale)
        return dx.view_as(grads[0]), d_norm, d_qkv, d_q_norm, d_k_norm, d_out, None, None


def _turns(rope: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    """Rotary angles as complex numbers (T, C/2)."""
    return torch.view_as_complex(rope[:length].to(dtype))


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _repeat(x_GBTC: Tensor, heads: int) -> Tensor:
    """Each key-value head as often as queries use it."""
    times = heads // len(x_GBTC)
    return x_GBTC if times == 1 else x_GBTC.repeat_interleave(times, 0)


def _pieces(n: int, length: int) -> tuple[list[slice], list[slice]]:
    """How attention over n heads and sequences is cut: by these, and by blocks of queries."""
    block = length if n * length * length <= ONE_BLOCK_UPTO else QUERY_BLOCK
    many = max(1, SCORES_IN_CACHE // (length * min(length, block)))
    firsts = [slice(a, min(n, a + many)) for a in range(0, n, many)]
    blocks = [slice(a, min(length, a + block)) for a in range(0, length, block)]
    return firsts, blocks


@lru_cache(maxsize=256)
def _mask(start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """-inf where a key comes after the query, for the queries of a block."""
    return torch.full((stop - start, stop), -math.inf, dtype=dtype).triu_(start + 1)


def _tall(scores_nTU: Tensor, x_nUC: Tensor) -> Tensor:
    """scores @ x."""
    if x_nUC.shape[2] >= NARROW:
        return torch.bmm(scores_nTU, x_nUC)
    return torch.bmm(x_nUC.transpose(1, 2), scores_nTU.transpose(1, 2)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Causal attention of (H, B, T, C), queries scaled; the probabilities in pieces."""
    shape = q.shape
    q, k, v = (t.reshape(-1, *shape[2:]) for t in (q, k, v))
    o = torch.empty_like(q)
    probs = []
    firsts, blocks = _pieces(len(q), shape[2])
    masks = [_mask(block.start, block.stop, q.dtype) for block in blocks]
    for first in firsts:
        for block, mask in zip(blocks, masks, strict=True):
            keys = slice(0, block.stop)
            scores = torch.baddbmm(mask, q[first, block], k[first, keys].transpose(1, 2))
            probs.append(torch.softmax(scores, -1))
            o[first, block] = _tall(probs[-1], v[first, keys])
    return o.view(shape), probs


def _attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: list[Tensor],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Gradients of `_attend`, written to dq, dk and dv."""
    do, q, k, v, dq, dk, dv = (t.reshape(-1, *q.shape[2:]) for t in (do, q, k, v, dq, dk, dv))
    firsts, blocks = _pieces(len(q), q.shape[1])
    for i, first in enumerate(firsts):
        # The last block sees all keys: it writes what the others add to.
        for j, block in reversed(list(enumerate(blocks))):
            keys = slice(0, block.stop)
            p, g = probs[i * len(blocks) + j], do[first, block]
            d_probs = torch.bmm(g, v[first, keys].transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_probs, p, -1, p.dtype)
            dq[first, block] = _tall(d_scores, k[first, keys])
            d_k = _tall(d_scores.transpose(1, 2), q[first, block])
            d_v = _tall(p.transpose(1, 2), g)
            if j == len(blocks) - 1:
                dk[first], dv[first] = d_k, d_v
            else:
                dk[first, keys] += d_k
                dv[first, keys] += d_v
