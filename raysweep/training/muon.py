"""Muon: momentum whose update is made orthogonal, a matrix at a time (Jordan et al. 2024).

`torch.optim.Muon` does the same to one two-dimensional tensor after another, each whole on its
device. Here experts and the matrices of all layers go through the iteration together, those that
are stored side by side (q, k and v; gate and up) each on its own, and those that FSDP2 has cut are
put together on one worker each. Tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysweep.model import Decoder
from raysweep.model.initial import is_sharded, local_part

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic, chosen by its authors for its slope at zero: singular values end within 0.3 of
one, not at it."""
EPS = 1e-7
RMS = 0.2
"""An update's root mean square over the learning rate, about that of AdamW's (Moonlight, arXiv
2502.16982): an orthogonal matrix has 1/sqrt(largest side)."""
TOGETHER, CACHED = 1 << 26, 1 << 17
"""Numbers of equal matrices that go through the iteration at once, at most: on GPUs; and on CPUs,
where they stay in a core's cache from one product to the next."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; weight decay as AdamW's.

    Args:
        groups: as of any optimizer, with `lr` and `weight_decay`; parameters (..., in, out).
        cuts: widths of the matrices that lie side by side in a parameter; one, where not named.
        dtype: in which the iteration is computed.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        *,
        momentum: float,
        cuts: dict[Tensor, Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.momentum, self.dtype, self.cuts = momentum, dtype, cuts
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter.detach())}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step. All workers that share a model must make it together."""
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"]]
        updates: list[Tensor] = []
        for parameter in parameters:
            gradient = _local(parameter.grad)
            buffer = _local(self.state[parameter]["momentum_buffer"])
            buffer.lerp_(gradient, 1 - self.momentum)
            updates.append(gradient.lerp(buffer, self.momentum))
        self._orthogonalise(parameters, updates)
        of_each = iter(updates)
        for group in self.param_groups:
            for parameter in group["params"]:
                value = _local(parameter)
                value.mul_(1 - group["lr"] * group["weight_decay"])
                value.add_(next(of_each), alpha=-group["lr"])

    def _orthogonalise(self, parameters: list[nn.Parameter], updates: list[Tensor]) -> None:
        """Replace updates by orthogonal ones of the wanted size, in place."""
        whole = [(p, u) for p, u in zip(parameters, updates, strict=True) if not _is_cut(p)]
        cut = [(p, u) for p, u in zip(parameters, updates, strict=True) if _is_cut(p)]
        exchange = _Exchange(*map(list, zip(*cut, strict=True))) if cut else None
        if exchange is not None:
            whole += exchange.gather()
        pieces = [
            piece
            for parameter, update in whole
            for piece in (update if update.ndim == 3 else update[None]).split(
                list(self.cuts.get(parameter, update.shape[-1:])), -1
            )
        ]
        orthogonalise(pieces, self.dtype)
        if exchange is not None:
            exchange.scatter()


def cuts_of(model: Decoder) -> dict[Tensor, Sequence[int]]:
    """Widths of the matrices that lie side by side in a decoder's parameters."""
    shape = model.shape
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    found: dict[Tensor, Sequence[int]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("qkv"):
            found[parameter] = [n * shape.head_dim for n in heads]
        elif name.endswith("gate_up"):
            found[parameter] = [parameter.shape[-1] // 2] * 2
    return found


def orthogonalise(pieces: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Make the matrices of tensors (M, in, out) orthogonal, with entries of root mean square `RMS`,
    in place; those of equal sides go through the iteration together."""
    alike: dict[tuple[int, int], list[Tensor]] = {}
    together = CACHED if all(piece.device.type == "cpu" for piece in pieces) else TOGETHER
    for piece in pieces:
        low = piece.mT if piece.shape[1] > piece.shape[2] else piece
        room = alike.setdefault((low.shape[1], low.shape[2]), [])
        most = max(1, together // (low.shape[1] * low.shape[2]))
        room.extend(part for part in low.split(most) if len(part))
    for (small, large), tensors in alike.items():
        most = max(1, together // (small * large))
        while tensors:
            count, taken = 0, []
            while tensors and (not taken or count + len(tensors[0]) <= most):
                count += len(tensors[0])
                taken.append(tensors.pop(0))
            done = newton_schulz(torch.cat([t.to(dtype) for t in taken]))
            done *= RMS * math.sqrt(large)
            for tensor, own in zip(taken, done.split([len(t) for t in taken]), strict=True):
                tensor.copy_(own)


def newton_schulz(x_MRC: Tensor) -> Tensor:
    """Orthogonal factors, nearly, of matrices no higher than wide.

    Singular values s, over the matrix's Frobenius norm, become p(p(...s)) with p(s) = a s + b s^3 +
    c s^5; singular vectors stay.
    """
    a, b, c = COEFFICIENTS
    x = x_MRC / torch.linalg.matrix_norm(x_MRC, keepdim=True).clamp_min(EPS)
    # Each step is (a I + b G + c G^2) x with G = x x^T: of wide matrices the factors are fewer
    # products. Their rounding grows with every step, too much in bfloat16.
    if x.shape[-1] >= 2 * x.shape[-2] and x.dtype != torch.bfloat16:
        return _factor(x @ x.mT) @ x
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _factor(gram: Tensor) -> Tensor:
    """What all steps together multiply x by [M, R, R], from x x^T."""
    a, b, c = COEFFICIENTS
    factor: Tensor | None = None
    for left in reversed(range(STEPS)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = step if factor is None else step @ factor
        if left:
            gram = step @ gram @ step
    assert factor is not None
    return factor


class _Exchange:
    """Matrices cut over workers by rows: each is whole on one of them for a while."""

    def __init__(self, parameters: list[nn.Parameter], updates: list[Tensor]) -> None:
        first = parameters[0]
        assert is_sharded(first)
        mesh = first.device_mesh
        self.parameters, self.updates = parameters, updates
        self.group = mesh.get_group(mesh.ndim - 1)
        self.n, self.rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        # Equal matrices follow one another: by turns all workers get as many.
        self.owned = [
            [i for i in range(len(parameters)) if i % self.n == worker] for worker in range(self.n)
        ]
        self.whole: list[Tensor] = []

    def gather(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The matrices that this worker gets, whole, to be changed in place."""
        mine = self.owned[self.rank]
        parts = self._swap(
            [[self.updates[i] for i in theirs] for theirs in self.owned],
            [[self._rows(i, worker) for i in mine] for worker in range(self.n)],
        )
        self.whole = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        return [(self.parameters[i], whole) for i, whole in zip(mine, self.whole, strict=True)]

    def scatter(self) -> None:
        """Give every worker its rows of them back."""
        mine = self.owned[self.rank]
        sizes = [[self._rows(i, worker)[0] for worker in range(self.n)] for i in mine]
        cut = [whole.split(rows) for whole, rows in zip(self.whole, sizes, strict=True)]
        back = self._swap(
            [[rows[worker] for rows in cut] for worker in range(self.n)],
            [[tuple(self.updates[i].shape) for i in theirs] for theirs in self.owned],
        )
        for theirs, tensors in zip(self.owned, back, strict=True):
            for i, tensor in zip(theirs, tensors, strict=True):
                self.updates[i].copy_(tensor)

    def _rows(self, index: int, worker: int) -> tuple[int, int]:
        """Shape of a worker's part of a matrix: as `torch.chunk` cuts it."""
        rows, columns = self.parameters[index].shape
        each = -(-rows // self.n)
        return max(0, min(each, rows - worker * each)), columns

    def _swap(
        self, given: list[list[Tensor]], wanted: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Send tensors to each worker, and get tensors of these shapes from each."""
        like = self.updates[0]
        sent = [torch.cat([t.flatten() for t in ts] or [like.new_empty(0)]) for ts in given]
        sizes = [[math.prod(shape) for shape in shapes] for shapes in wanted]
        got = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            got, torch.cat(sent), [sum(s) for s in sizes], [len(s) for s in sent], group=self.group
        )
        pieces = iter(got.split([size for each in sizes for size in each]))
        return [[next(pieces).view(shape) for shape in shapes] for shapes in wanted]


def _is_cut(parameter: Tensor) -> bool:
    """Whether a worker holds some rows of a matrix. (Of experts it holds whole matrices.)"""
    return is_sharded(parameter) and parameter.ndim == 2


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return local_part(tensor)[0]
