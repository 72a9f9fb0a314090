"""Initial weights: a draw for each parameter, the same however it is spread over workers."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from raysweep.model.parametrization import Parametrization

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CHUNK = 1 << 20
"""Numbers of a parameter that one generator draws."""


@torch.no_grad()
def initialise(
    model: nn.Module, parametrization: Parametrization, *, seed: int, threads: int = 1
) -> None:
    """Gaussian weights, as wide as the parametrization says; gains of one.

    Each chunk of each parameter comes from a generator seeded by the trial's seed, the parameter's
    name and the chunk's number: a worker that holds a part of a parameter draws that part alone.
    """
    with ThreadPoolExecutor(threads) as pool:
        for name, parameter in model.named_parameters():
            local, start = local_part(parameter)
            if parameter.ndim == 1:
                local.fill_(1.0)
                continue
            std = parametrization.std(name, parameter.shape[-2])
            _fill(local.view(-1), start, std, f"{seed}/{name}", pool)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether FSDP2 has cut it over workers. Importing DTensor for it would cost a process 1 s."""
    return hasattr(tensor, "to_local")


def local_part(parameter: Tensor) -> tuple[Tensor, int]:
    """What this worker holds of a parameter, and the flat index of its first number: a parameter is
    only ever cut along its first dimension, so a part is contiguous."""
    if not is_sharded(parameter):
        return parameter.detach(), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset[0] * math.prod(parameter.shape[1:])


def _fill(flat: Tensor, start: int, std: float, name: str, pool: ThreadPoolExecutor) -> None:
    """Numbers `start` on of the parameter of that name, into `flat`."""

    def fill(chunk: int) -> None:
        first, last = max(start, chunk * CHUNK), min(start + len(flat), (chunk + 1) * CHUNK)
        part = _draw(name, chunk, last - chunk * CHUNK)[first - chunk * CHUNK :]
        flat[first - start : last - start] = torch.from_numpy(part).mul_(std).to(flat.device)

    list(pool.map(fill, range(start // CHUNK, -(-(start + len(flat)) // CHUNK))))


def _draw(name: str, chunk: int, count: int) -> np.ndarray:
    """The first `count` numbers of a chunk."""
    digest = hashlib.sha256(f"{name}/{chunk}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(np.frombuffer(digest, dtype="<u4")))
    return generator.standard_normal(count, dtype=np.float32)
