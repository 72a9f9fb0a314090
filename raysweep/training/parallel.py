"""Workers that train one model together: what they sum, and how the model is spread over them.

DDP here is one sum of the flat gradient after the last micro-batch. No collective runs before
that, so a worker that is out of memory can halve its micro-batch on its own. FSDP2 shards each
block, gathers it for use and scatters its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
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
        for block in (*model.attention, *model.feed_forward):
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "evaluate")
        return ShardedParameters(model)

    def gather_state(self, model: Decoder, optimizer: Optimizer) -> dict[str, Any]:
        """What has been learned, whole; all workers must call this, the first one gets it."""
        if not self.sharded:
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        values, moments = get_state_dict(model, optimizer, options=options)
        return {"model": values, "optimizer": moments}

    def scatter_state(self, model: Decoder, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what `gather_state` gave; all workers must call this with the whole state."""
        if not self.sharded:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return
        for module in model.modules():  # an evaluation leaves parameters gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )

    def from_leader(self, value: Any) -> Any:
        """The first worker's value, on all."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]
