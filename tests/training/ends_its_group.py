"""One of two workers of a function that ends its process group while its model lives, twelve times;
started by test_connection.py."""

import faulthandler
import socket
from pathlib import Path

import torch
from torch import distributed, nn
from workers import work

from raysweep.training.process_group import Connection


def ends_its_group() -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    distributed.destroy_process_group()


def meet_by_address(rank: int, world_size: int) -> None:
    """As Ray's workers do: the store outlives its process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        box = [probe.getsockname()[1]]
    distributed.broadcast_object_list(box)
    distributed.destroy_process_group()
    address = f"tcp://127.0.0.1:{box[0]}"
    distributed.init_process_group("gloo", address, rank=rank, world_size=world_size)


def task(rank: int, world_size: int, folder: Path) -> int:
    faulthandler.dump_traceback_later(120, exit=True)
    meet_by_address(rank, world_size)
    connection, rounds = Connection(), 12
    for k in range(rounds):
        ends_its_group()
        connection.renew(f"after {k}")
    faulthandler.cancel_dump_traceback_later()
    return rounds


if __name__ == "__main__":
    work(task)
