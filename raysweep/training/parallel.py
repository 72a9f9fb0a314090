"""Workers that train one model together: what they sum, and how the model is spread over them.

DDP here is one sum of the flat gradient after the last micro-batch. No collective runs before
that, so a worker that is out of memory can halve its micro-batch on its own. FSDP2 shards each
block, gathers it for use and scatters its gradient; HSDP does so within each node, and sums
gradients over nodes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysweep.errors import UserError
from raysweep.model import Decoder
from raysweep.model.transformer import Experts
from raysweep.training.groups import GroupOf
from raysweep.training.optimizer import FlatParameters, Parameters, ShardedParameters


@dataclass(frozen=True)
class Workers:
    """This process's place among those of the run. The process group must be initialised."""

    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    """FSDP2 instead of DDP."""
    replicas: int = 1
    """Of a sharded model: how many copies the workers hold together (HSDP)."""

    @classmethod
    def of_process_group(cls, strategy: str) -> Workers:
        """The default process group's workers, or one worker if there is none. With `hsdp` there
        are as many replicas as nodes, by LOCAL_WORLD_SIZE; UserError where nodes hold unequally
        many workers."""
        if not dist.is_initialized():
            return cls()
        rank, size, replicas = dist.get_rank(), dist.get_world_size(), 1
        if strategy == "hsdp":
            here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            everywhere: list[Any] = [None] * size
            dist.all_gather_object(everywhere, here)
            if len(set(everywhere)) > 1 or size % here:
                raise UserError(
                    f"hsdp needs equally many workers on each node, and finds {everywhere}: set "
                    "resources.strategy to fsdp, or workers to a multiple of a node's GPUs"
                )
            replicas = size // here
        return cls(rank, size, strategy != "ddp", replicas)

    @property
    def owns(self) -> bool:
        """Whether what this worker holds of the model is its own to save, not another's copy."""
        if self.sharded:
            return self.rank < self.world_size // self.replicas
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the workers' numbers, on all."""
        if self.world_size == 1:
            return number
        box = torch.tensor(number, device=device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the workers' numbers, on all."""
        return -self.largest(-number, device)

    def mean_gradient(self, gradients: list[Tensor]) -> None:
        """Average the workers' gradients, in place. FSDP2 has already done it."""
        if self.world_size > 1 and not self.sharded:
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient.div_(self.world_size)

    def sum_of_parts(self, local: Tensor) -> Tensor:
        """A sum over the whole model from each worker's over what it holds, in place."""
        return self.sum(local).div_(self.replicas) if self.sharded else local

    def distribute(self, model: Decoder, device: torch.device, group_of: GroupOf) -> Parameters:
        """Spread the model, on the meta device if it is to be sharded, and take hold of its
        parameters: of a sharded one not yet filled.

        Blocks are gathered and computed in the model's dtype. Gradients are summed in float32, and
        routers stay in float32 throughout.
        """
        if not self.sharded:
            return FlatParameters(model, group_of)
        from torch.distributed.fsdp import (  # 1 s to import, and one worker alone needs none of it
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        mesh = _mesh(device.type, self.replicas, self.world_size // self.replicas)
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        mixed = MixedPrecisionPolicy(
            param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        blocks: list[nn.Module] = [*model.attention, *model.feed_forward]
        for block in blocks:
            if isinstance(block, Experts):
                fully_shard(block.router, mesh=mesh, mp_policy=exact)
            fully_shard(block, mesh=mesh, mp_policy=mixed)
        # Embedding and head as well are held in full only while they are used.
        fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
        register_fsdp_forward_method(model, "evaluate")
        model.to_empty(device=device)
        return ShardedParameters(model, group_of)

    def reshard(self, model: Decoder) -> None:
        """Free what an evaluation left gathered (FSDP2), before parameters are written to."""
        if not self.sharded:
            return
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def from_leader(self, value: Any) -> Any:
        """The first worker's value, on all. For small things."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]


_meshes: dict[tuple[str, int, int, Any], Any] = {}
"""By device, sizes and process group. Each mesh of two dimensions makes communicators, which stay
for as long as the process: trials share one."""


def _mesh(device: str, replicas: int, shards: int) -> Any:
    """The workers as (replicas, shards), or in a row. Without a mesh FSDP2 would take the machine's
    accelerator, also for a run on its CPUs."""
    from torch.distributed.device_mesh import init_device_mesh

    key = device, replicas, shards, dist.group.WORLD
    if key not in _meshes:
        _meshes.clear()  # those of a process group that was ended
        sizes = (replicas, shards) if replicas > 1 else (shards,)
        names = ("replicate", "shard")[-len(sizes) :]
        _meshes[key] = init_device_mesh(device, sizes, mesh_dim_names=names)
    return _meshes[key]
