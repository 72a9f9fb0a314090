"""A trial's row: its outcome, joined with the exact counts and where it was made."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.study import Architecture, Cell, TrialSpec
from raysweep.study.shape import ModelShape

if TYPE_CHECKING:
    from raysweep.training.outcome import TrialOutcome


def cell_columns(cell: Cell) -> dict[str, Any]:
    """The columns that a cell fixes: shape, counts and horizon."""
    counts = {name: None if math.isnan(n) else n for name, n in vars(cell.counts).items()}
    return {
        "cell": cell.name,
        "architecture": cell.architecture,
        "architecture_kind": cell.settings.kind,
        "scale": cell.scale,
        "sequence_length": cell.sequence_length,
        "experts": cell.model.experts,
        "top_k": cell.model.top_k,
        **(_shape_columns(cell.shape, cell.settings) if cell.own is None else {}),
        **counts,
        "params_dense": cell.params_dense,
        "tokens": cell.tokens,
    }


def _shape_columns(shape: ModelShape, settings: Architecture) -> dict[str, Any]:
    routed = shape.is_moe
    return {
        "d_model": shape.d_model,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "d_ff": shape.d_ff,
        "vocab_size": shape.vocab_size,
        "shared_experts": shape.shared_experts,
        "expert_ff": shape.expert_ff,
        "moe_layers": len(shape.moe_layers),
        "first_dense": settings.first_dense if routed else None,
        "scores": settings.scores if routed else None,
        "balance": settings.balance if routed else None,
        "route_scale": settings.route_scale if routed else None,
    }


def spec_columns(spec: TrialSpec) -> dict[str, Any]:
    """The columns that are known before a trial starts."""
    return {
        **cell_columns(spec.cell),
        "trial_key": spec.key,
        "study": spec.study,
        "source": "raysweep" if spec.training is None else "own",
        "learning_rate": spec.learning_rate,
        "batch_sequences": spec.batch_sequences,
        "batch_tokens": spec.batch_tokens,
        "seed": spec.seed,
        "steps": spec.steps,
        "recipe": json.dumps(spec.recipe_values(), sort_keys=True),
        "data_hash": spec.data_hash,
        "validation_sequences": spec.validation_sequences if spec.training is None else None,
        "git_revision": git_revision(),
        "versions": json.dumps(library_versions(), sort_keys=True),
    }


def trial_row(
    spec: TrialSpec,
    outcome: TrialOutcome,
    *,
    strategy: str,
    train_tokens: int | None,
    started_at: datetime,
    seconds_wall: float,
) -> dict[str, Any]:
    """The row of a trial that ran to an end of its own, good or bad.

    Args:
        train_tokens: size of the corpus, for the number of epochs; None where it is not known.
    """
    from raysweep.results.schema import make_row

    return make_row(
        **outcome_columns(spec, outcome, train_tokens=train_tokens),
        strategy=strategy,
        started_at=started_at,
        seconds_wall=seconds_wall,
    )


def outcome_columns(
    spec: TrialSpec, outcome: TrialOutcome, *, train_tokens: int | None
) -> dict[str, Any]:
    """The columns that a trial and its outcome fix, as plain values."""
    counts, resources = spec.cell.counts, spec.cell.resources
    gpus = resources.gpus_per_worker * outcome.world_size
    return {
        **spec_columns(spec),
        **{name: value for name, value in vars(outcome).items() if name != "curve"},
        "epochs": None if train_tokens is None else outcome.tokens_seen / train_tokens,
        "flops": counts.flops_per_token * outcome.tokens_seen,
        "flops_6nd": counts.flops_6nd(outcome.tokens_seen),
        "named_losses": json.dumps(outcome.named_losses) if outcome.named_losses else None,
        "metrics": json.dumps(outcome.metrics) if outcome.metrics else None,
        "gpu_hours": outcome.seconds_train * gpus / 3600,
        "mfu": _mfu(spec, outcome),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
    }


def _mfu(spec: TrialSpec, outcome: TrialOutcome) -> float | None:
    """Model FLOPs utilisation of the share of GPUs that the trial had; None on a device whose peak
    no data sheet here tells."""
    from raysweep.scaling.compute.roofline import gpu_of_device

    gpu = gpu_of_device(outcome.device)
    if gpu is None:
        return None
    flops = spec.cell.counts.flops_per_token * outcome.tokens_per_second
    share = min(1.0, spec.cell.resources.gpus_per_worker or 1.0)
    return flops / (gpu.flops * share * outcome.world_size)


def unfinished_row(
    spec: TrialSpec,
    status: str,
    reason: str,
    *,
    strategy: str,
    started_at: datetime,
    seconds_wall: float,
    last_report: Mapping[str, Any],
) -> dict[str, Any]:
    """The row that the driver writes for a trial that could not: it died, or was stopped."""
    from raysweep.results.schema import make_row

    tokens = last_report.get("tokens")
    return make_row(
        **spec_columns(spec),
        strategy=strategy,
        status=status,
        reason=reason,
        step=last_report.get("step"),
        tokens_seen=tokens,
        tokens_trained=tokens,
        flops=None if tokens is None else spec.cell.counts.flops_per_token * tokens,
        train_loss=last_report.get("train_loss"),
        started_at=started_at,
        seconds_wall=seconds_wall,
    )


@cache
def library_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("raysweep", "torch", "numpy", "ray", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_revision() -> str | None:
    """Revision of the checkout that raysweep runs from, with + when modified; None outside one."""
    folder = Path(__file__).resolve().parent.parent.parent
    if not (folder / ".git").exists():
        return os.environ.get("RAYSWEEP_GIT_REVISION")
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
