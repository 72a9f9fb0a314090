"""The process group of a Ray Train group: how its workers meet, and how a user's function finds
another one where the last was left in any state."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import ray
from ray import train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

PEER_SECONDS = 1800.0
"""How long a worker waits for others, in any operation of their process group."""
LEAVE_SECONDS = 5.0
"""What workers get to end their process group."""


class ProcessGroupConfig(BackendConfig):
    """As Ray's `TorchConfig`, whose import takes PyTorch with it: here only workers import that,
    and not the processes that start them one after the other."""

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        return _on_own_gpu


class ProcessGroupBackend(Backend):
    """Has the workers make a process group: NCCL's on GPUs, else Gloo's."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Run where the group is started."""
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
        place = worker_group.execute_single(0, _meeting_place)
        workers = range(len(worker_group))
        ray.get([worker_group.execute_single_async(i, _join, backend, *place) for i in workers])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Run where the group is started."""
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)


def _meeting_place() -> tuple[str, int]:
    """In a worker: its node's address, and a port that is free."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _join(backend: str, address: str, port: int) -> None:
    """In a worker: meet the others at the first one's address."""
    from ray.train.torch import get_device
    from torch import distributed

    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(get_device()),  # for Hugging Face's library
    }
    distributed.init_process_group(
        backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=PEER_SECONDS)
    )


def _leave() -> None:
    """In a worker: end the process group."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def _on_own_gpu() -> Iterator[None]:
    """In a worker: what is put on "cuda" goes to the GPU that Ray gave it."""
    import torch
    from ray.train.torch import get_device

    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    yield


class Connection:
    """The process group that a user's function finds: workers can leave it and make another."""

    def __init__(self) -> None:
        from torch import distributed
        from torch.distributed.distributed_c10d import _get_default_store

        # The store lives on: another server at the same port could be taken for it.
        self._store, self._backend = _get_default_store(), distributed.get_backend()
        self._rank, self._size = distributed.get_rank(), distributed.get_world_size()
        # Functions of `distributed.nn` have the group that is up when they are imported, as DDP
        # does, for a default: it would never end.
        distributed.destroy_process_group()
        import torch.distributed.nn  # noqa: F401

        self.renew("first")

    def drop(self) -> None:
        """Leave the group: workers that wait for this one then fail, too (but for NCCL's)."""
        from torch import distributed

        gc.collect()  # of what failed, models hold on to the group
        if distributed.is_initialized():
            distributed.destroy_process_group()
        self._group = None

    def renew(self, name: str) -> None:
        """Make a new group with all others. Raises where the GPU is of no use any more."""
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        self.drop()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        distributed.init_process_group(
            self._backend,
            store=PrefixStore(name, self._store),
            rank=self._rank,
            world_size=self._size,
        )
        # Where a function ends the group while its model lives, the model would be the last to let
        # go of it, and wait with Python's lock for Gloo's threads, which may want that.
        self._group = distributed.group.WORLD
