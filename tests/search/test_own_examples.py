"""The examples of own training, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from raysweep.results import Results

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "search_spaces/own_training"


def run(name: str, folder: Path, *changes: str) -> pd.DataFrame:
    words = [sys.executable, "-m", "raysweep", "run", str(EXAMPLES / f"{name}.yaml")]
    words += ["--results", str(folder / "results"), "--report", str(folder / "report")]
    words += [word for change in changes for word in ("--set", change)]
    done = subprocess.run(
        words, cwd=REPO, capture_output=True, text=True, timeout=500, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "report/index.html").stat().st_size > 10_000
    return Results.open(folder / "results").to_pandas()


def test_huggingface_by_a_function(tmp_path: Path) -> None:
    few = ("search.trials_per_cell=1", "horizons=[{tokens_per_param: 5}]")
    frame = run("huggingface", tmp_path, *few, "search.batch_sequences={low: 16, high: 64}")
    assert len(frame) == 3
    assert set(frame["status"]) == {"finished"}
    assert (frame["loss"] < 5.0).all()
    assert frame["loss_se"].between(0.001, 0.5).all()
    assert frame["params_total"].gt(frame["params_total_non_embedding"]).all()
    curves = Results.open(tmp_path / "results").curves()
    assert curves.groupby("trial_key").size().min() > 1
    assert curves["grad_norm"].gt(0).all()


def test_torchrun_by_a_command(tmp_path: Path) -> None:
    frame = run("torchrun", tmp_path, "search.trials_per_cell=1")
    assert len(frame) == 2
    assert set(frame["status"]) == {"finished"}
    assert (frame["loss"] < 5.0).all()
    assert frame["metrics"].tolist() == ['{"started_at": 0.0}'] * 2
    assert frame["train_loss"].notna().all()
    logs = [p.read_text() for p in (tmp_path / "results/logs").iterdir()]
    assert len(logs) == 2


def test_ask_and_tell_from_a_shell_loop(tmp_path: Path) -> None:
    command = tmp_path / "bin/raysweep"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m raysweep "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLES / "loop.sh"), str(tmp_path / "results")],
        cwd=REPO,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    frame = Results.open(tmp_path / "results").to_pandas()
    assert frame.groupby("cell").size().tolist() == [2, 2]
    assert set(frame["status"]) == {"finished"}
    assert (frame["loss"] < 5.5).all()
