"""What must hold on a GPU (`benchmarks.gpu_checks`); and on any machine that those checks run."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_checks import CHECKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    CHECKS[name](torch.device("cuda", 0))


@pytest.mark.slow
def test_the_same_on_a_cpu(repo):
    """In a process of their own: they count graphs, and make process groups."""
    environment = os.environ | {"PYTHONPATH": str(repo), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_checks"]
    done = subprocess.run(
        command, env=environment, cwd=repo, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name}: holds on cpu" for name in CHECKS]
