"""Tests on a process group: `run_workers` starts a script several times, `work` is each one's end.

A script in this folder imports `toys` and `workers` by these names.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parents[2]


def run_workers(script: str, folder: Path, world_size: int = 2) -> list[Any]:
    """Start a script of this folder on each worker; what each one's `work` returned, by rank."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "error:::raysweep", str(Path(__file__).with_name(script))]
    processes = [
        subprocess.Popen(
            [*words, str(rank), str(world_size), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            _, error = process.communicate(timeout=500)
            assert process.returncode == 0, error[-2000:]
    finally:
        for process in processes:
            process.kill()
    return workers_said(folder, world_size)


def workers_said(folder: Path, world_size: int = 2) -> list[Any]:
    """What `run_workers` returned of this folder; empty where it has not run."""
    files = [_said(folder, rank, world_size) for rank in range(world_size)]
    return [pickle.loads(f.read_bytes()) for f in files] if all(map(Path.exists, files)) else []


def work(task: Callable[[int, int, Path], Any]) -> NoReturn:
    """In a script: join the group of the command line, run `task(rank, world_size, folder)`, and
    leave what it returns for `run_workers`."""
    import torch
    from torch import distributed

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size
    )
    found = task(rank, world_size, folder)
    _said(folder, rank, world_size).write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()
    sys.stderr.flush()
    # A thread of gloo may still have a tensor to drop, for which it takes Python's lock: while
    # the interpreter ends (3.11), that aborts the process. So there is no such end.
    os._exit(0)


def _said(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"said-{rank}-of-{world_size}"
