"""What a study would cost: cells, parameters, tokens, FLOPs and GPU-hours. Trains nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from raysweep.config import Cell, Study
from raysweep.config.study import short_number

REFERENCE_PEAK_FLOPS = 989e12
"""Dense bf16 peak of one H100 SXM, from its data sheet."""
REFERENCE_UTILISATION = 0.4
"""Model FLOPs utilisation assumed for GPU-hours."""


@dataclass(frozen=True)
class PlannedCell:
    """One cell and what its trials cost together."""

    name: str
    shape: str
    params_total: int
    params_active: int
    params_total_non_embedding: int
    params_active_non_embedding: int
    params_target: float | None
    """What the file asked for, where it gave a target."""
    tokens: int
    trials: int
    flops_per_trial: float
    flops_6nd_per_trial: float
    flops: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """All cells of a study with their cost."""

    study: str
    description: str
    cells: tuple[PlannedCell, ...]

    @property
    def trials(self) -> int:
        return sum(c.trials for c in self.cells)

    @property
    def flops(self) -> float:
        return sum(c.flops for c in self.cells)

    @property
    def gpu_hours(self) -> float:
        return sum(c.gpu_hours for c in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "study": self.study,
            "description": self.description,
            "trials": self.trials,
            "flops": self.flops,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_assume": {
                "peak_flops": REFERENCE_PEAK_FLOPS,
                "utilisation": REFERENCE_UTILISATION,
            },
            "cells": [asdict(c) for c in self.cells],
        }


def make_plan(study: Study) -> Plan:
    """The plan of a study: trials as budgeted, without extensions of a range."""
    return Plan(study.name, study.space.description, tuple(_planned(study, c) for c in study.cells))


def _planned(study: Study, cell: Cell) -> PlannedCell:
    search, counts = study.space.search, cell.counts
    first = next(c for c in study.cells if c.architecture == cell.architecture)
    budget = search.trials_per_cell
    if cell is first and search.first_cell_trials is not None:
        budget = search.first_cell_trials
    trials = budget + search.repeats_at_optimum
    targets = [e.params for e in study.space.scales if e.params and _is_scale(e, cell)]
    flops = cell.flops * trials
    return PlannedCell(
        name=cell.name,
        shape=_shape_words(cell),
        params_total=counts.params_total,
        params_active=counts.params_active,
        params_total_non_embedding=counts.params_total_non_embedding,
        params_active_non_embedding=counts.params_active_non_embedding,
        params_target=targets[0] if targets else None,
        tokens=cell.tokens,
        trials=trials,
        flops_per_trial=cell.flops,
        flops_6nd_per_trial=counts.flops_6nd(cell.tokens),
        flops=flops,
        gpu_hours=flops / (REFERENCE_PEAK_FLOPS * REFERENCE_UTILISATION) / 3600,
    )


def _is_scale(entry: Any, cell: Cell) -> bool:
    return cell.scale == (entry.name or short_number(entry.params))


def _shape_words(cell: Cell) -> str:
    shape = cell.shape
    words = f"d{shape.d_model} L{shape.layers} h{shape.heads} ff{shape.d_ff}"
    if shape.is_moe:
        shared = f"+{shape.shared_experts}" if shape.shared_experts else ""
        words += f" {shape.experts}x{shape.expert_ff} top-{shape.top_k}{shared}"
        if len(shape.moe_layers) < shape.layers:
            words += f" in {len(shape.moe_layers)} layers"
    return words


def render_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan as a table."""
    console = console or Console()
    table = Table(title=f"study {plan.study}", title_justify="left", box=None, pad_edge=False)
    with_shape = console.width >= 120
    table.add_column("cell", no_wrap=True)
    if with_shape:
        table.add_column("shape", no_wrap=True)
    for title in ("active", "total", "tokens", "trials", "FLOPs/trial", "GPU-hours"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in plan.cells:
        table.add_row(
            cell.name,
            *([cell.shape] if with_shape else []),
            short_number(cell.params_active_non_embedding),
            short_number(cell.params_total_non_embedding),
            short_number(cell.tokens),
            str(cell.trials),
            f"{cell.flops_per_trial:.2e}",
            f"{cell.gpu_hours:.2g}",
        )
    console.print(table)
    console.print(summary_words(plan), highlight=False)


def summary_words(plan: Plan) -> str:
    """The whole of a plan in a sentence."""
    return (
        f"{len(plan.cells)} cells, {plan.trials} trials, {plan.flops:.2e} FLOPs, "
        f"{plan.gpu_hours:.2g} GPU-hours on H100s at {REFERENCE_UTILISATION:.0%} utilisation. "
        "Parameters are non-embedding."
    )
