"""Workers that train one model together: what they sum, and how the model is spread over them.

DDP here is one sum of the flat gradient after the last micro-batch. No collective runs before
that, so a worker that is out of memory can halve its micro-batch on its own. FSDP2 shards each
block, gathers it for use and scatters its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from raysweep.model import Decoder
from raysweep.training.optimizer import FlatParameters, Parameters, ShardedParameters


@dataclass(frozen=True)
class Workers:
    """This process's place among those of the run. The process group must be initialised."""

    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    """FSDP2 instead of DDP."""

    @classmethod
    def of_process_group(cls, strategy: str) -> Workers:
        """The default process group's workers, or one worker if there is none."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), strategy == "fsdp")

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

    def mean_gradient(self, gradients: list[Tensor]) -> None:
        """Average the workers' gradients, in place. FSDP2 has already done it."""
        if self.world_size > 1 and not self.sharded:
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient.div_(self.world_size)

    def squared_norm(self, local: Tensor) -> Tensor:
        """Squared norm of the whole gradient from this worker's `optimizer.squared_norm`."""
        return self.sum(local) if self.sharded else local

    def distribute(self, model: Decoder) -> Parameters:
        """Spread the model, equal on all workers, and take hold of its parameters."""
        if not self.sharded:
            return FlatParameters(model)
        # Without a mesh it would take the machine's accelerator, also for a run on its CPUs.
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
        for block in (*model.attention, *model.feed_forward):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "evaluate")
        return ShardedParameters(model)

    def gather_state(self, model: Decoder, optimizer: Optimizer) -> dict[str, Any]:
        """What has been learned, whole. All workers must call this; of a sharded model the first
        one gets it, the others get empty parts."""
        if not self.sharded:
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        values, moments = get_state_dict(model, optimizer, options=options)
        return {"model": values, "optimizer": moments}

    def scatter_state(self, model: Decoder, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what `gather_state` gave; all workers must call this, of a sharded model only the
        first one with the whole state."""
        if not self.sharded:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return
        for module in model.modules():  # an evaluation leaves parameters gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        # Tensor by tensor from the first worker: no other holds the whole. (set_state_dict does
        # both at once, but takes an empty part for nothing to do, and the first waits for ever.)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # (set_model_state_dict writes its shards into the dict it is given, hence a new one.)
        values, moments = ({**state["model"]}, state["optimizer"]) if self.rank == 0 else ({}, {})
        set_model_state_dict(model, values, options=options)
        set_optimizer_state_dict(model, optimizer, moments, options=options)

    def from_leader(self, value: Any) -> Any:
        """The first worker's value, on all."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]
