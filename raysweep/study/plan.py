"""What a study would cost: cells, tokens, FLOPs, GPU-hours and, from a calibration, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from raysweep.study.cells import ScaleEntry
from raysweep.study.schema import SearchSpace
from raysweep.study.spec import Cell
from raysweep.text import duration, scientific, short

if TYPE_CHECKING:
    from rich.console import Console

REFERENCE_PEAK_FLOPS = 989e12
"""Dense bf16 peak of one H100 SXM, from its data sheet."""
REFERENCE_UTILISATION = 0.4
"""Model FLOPs utilisation assumed for GPU-hours."""
START_SECONDS = 8.0
"""Until Ray and its first worker are there."""
TRIAL_SECONDS = 0.05
"""Between two trials of one worker: the proposal, the row, the messages."""
MAX_GRANTED = 4
"""No cell gets more than so many times `search.trials_per_cell`, whatever `search.total_flops`."""
EVALUATION = 1 / 3
"""Of a training token, what a token of the validation slice costs: forward only."""


class Planned(Protocol):
    """What a plan is made of: a `Study`."""

    @property
    def name(self) -> str: ...

    @property
    def space(self) -> SearchSpace: ...

    @property
    def cells(self) -> Sequence[Cell]: ...

    def entry(self, cell: Cell) -> ScaleEntry: ...

    def stable_run(self, cell: Cell) -> Cell: ...

    def flops(self, cell: Cell) -> float: ...


@dataclass(frozen=True)
class PlannedCell:
    """One cell and what its trials cost together."""

    name: str
    shape: str
    params_total: float | None
    """With embeddings; None where that is not known."""
    params_active: float | None
    params_total_non_embedding: float
    params_active_non_embedding: float
    params_target: float | None
    """What the file asked for, where it gave a target."""
    tokens: int
    trials: int
    flops_per_trial: float
    flops_6nd_per_trial: float
    flops: float
    gpu_hours: float


@dataclass(frozen=True)
class Pace:
    """What a cell's training takes on this machine, timed.

    A step takes `seconds_per_step` and `seconds_per_token` for each token of its batch; a trial
    `seconds_fixed` beside its steps."""

    cell: str
    architecture: str
    flops_per_token: float
    seconds_per_step: float
    seconds_per_token: float
    seconds_fixed: float


@dataclass(frozen=True)
class Calibration:
    """Paces of a few cells, `at_once` processes timed side by side; `slots` trials run at once."""

    slots: int
    paces: tuple[Pace, ...]
    at_once: int


@dataclass(frozen=True, repr=False)
class Plan:
    """All cells of a study with their cost; `seconds` of each on this machine, once calibrated."""

    study: str
    description: str
    cells: tuple[PlannedCell, ...]
    own: bool = False
    """Whether the user's own code trains: then 6 N D stands beside the FLOPs."""
    seconds: tuple[float, ...] = ()
    """Of all trials of each cell together, on one worker (or one group of workers)."""
    calibration: Calibration | None = None
    total_flops: float | None = None
    """The study's `search.total_flops`, where it sets one."""
    most_flops: float = math.nan
    """Of as many trials as such a budget may grant at most, were it endless."""

    def __repr__(self) -> str:
        return f"<Plan of {self.study}: {summary_words(self)}>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as said:
            render_plan(self, console)
        return said.get().rstrip()

    @property
    def wall_seconds(self) -> float:
        """Until the study is done, on this machine; NaN without a calibration."""
        if self.calibration is None:
            return math.nan
        return START_SECONDS + sum(self.seconds) / self.calibration.slots

    @property
    def trials(self) -> int:
        return sum(c.trials for c in self.cells)

    @property
    def flops(self) -> float:
        return sum(c.flops for c in self.cells)

    @property
    def flops_at_most(self) -> float:
        """FLOPs that the study may take: those of its trials, or what `total_flops` makes of them,
        less or more."""
        return self.flops if self.total_flops is None else min(self.total_flops, self.most_flops)

    @property
    def never_trained(self) -> tuple[str, ...]:
        """Cells of which one trial alone costs more than `total_flops`."""
        limit = math.inf if self.total_flops is None else self.total_flops
        return tuple(c.name for c in self.cells if c.flops_per_trial > limit)

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
            "total_flops": self.total_flops,
            "flops_at_most": self.flops_at_most,
            "never_trained": list(self.never_trained),
            "gpu_hours": self.gpu_hours,
            "gpu_hours_assume": {
                "peak_flops": REFERENCE_PEAK_FLOPS,
                "utilisation": REFERENCE_UTILISATION,
            },
            "this_machine": self._timed(),
            "cells": [asdict(c) for c in self.cells],
        }

    def _timed(self) -> dict[str, Any] | None:
        if self.calibration is None:
            return None
        cells = dict(zip((c.name for c in self.cells), self.seconds, strict=True))
        return {
            "wall_seconds": self.wall_seconds,
            "start_seconds": START_SECONDS,
            "worker_seconds_by_cell": cells,
            "calibration": asdict(self.calibration),
        }


def make_plan(study: Planned) -> Plan:
    """The plan of a study: trials as budgeted, without extensions of a range and without what
    `search.total_flops` leaves out or adds, which the plan bounds."""
    search = study.space.search
    cells = tuple(_planned(study, c) for c in study.cells)
    granted = MAX_GRANTED * search.trials_per_cell + search.repeats_at_optimum
    return Plan(
        study.name,
        study.space.description,
        cells,
        own=study.space.training is not None,
        total_flops=search.total_flops,
        most_flops=sum(c.flops_per_trial * max(c.trials, granted) for c in cells),
    )


def with_times(plan: Plan, study: Planned, calibration: Calibration) -> Plan:
    """The plan with the time that its trials would take here, from the paces of a few cells.

    Between the cells timed the seconds of a step follow a power of FLOPs a token; beyond the
    largest they grow in proportion. The batch is anywhere in its range of powers of two alike.
    """
    low, high = study.space.search.batch_sequences.low, study.space.search.batch_sequences.high
    batches = [2**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    share = sum(1 / b for b in batches or [low]) / len(batches or [low])
    seconds = []
    for cell, planned in zip(study.cells, plan.cells, strict=True):
        pace = _pace_at(calibration.paces, cell)
        trained = planned.flops_per_trial / cell.counts.flops_per_token
        steps = trained * share / cell.sequence_length
        sets = max(1, len(study.space.data.validation)) + (
            study.space.recipe.ema_tokens is not None
        )
        validation = sets * study.space.data.validation_sequences * cell.sequence_length
        tokens = trained + EVALUATION * validation
        trial = pace.seconds_fixed + TRIAL_SECONDS + steps * pace.seconds_per_step
        trial += tokens * pace.seconds_per_token
        seconds.append(planned.trials * trial / cell.resources.workers)
    return replace(plan, seconds=tuple(seconds), calibration=calibration)


def _pace_at(paces: Sequence[Pace], cell: Cell) -> Pace:
    """A cell's pace from those of its architecture that were timed."""
    own = [p for p in paces if p.architecture == cell.architecture]
    own = sorted(own or paces, key=lambda p: p.flops_per_token)
    small, large = own[0], own[-1]
    cost = cell.counts.flops_per_token
    if cost >= large.flops_per_token or len(own) == 1:
        grown = cost / large.flops_per_token
        return replace(
            large,
            cell=cell.name,
            seconds_per_token=large.seconds_per_token * grown,
            seconds_fixed=large.seconds_fixed,
        )
    along = math.log(cost / small.flops_per_token)
    along /= math.log(large.flops_per_token / small.flops_per_token)

    def between(name: str) -> float:
        a, b = (max(getattr(p, name), 1e-12) for p in (small, large))
        return a * (b / a) ** max(along, 0.0)

    return replace(
        small,
        cell=cell.name,
        seconds_per_step=between("seconds_per_step"),
        seconds_per_token=between("seconds_per_token"),
        seconds_fixed=between("seconds_fixed"),
    )


def _planned(study: Planned, cell: Cell) -> PlannedCell:
    search, counts = study.space.search, cell.counts
    first = next(c for c in study.cells if c.architecture == cell.architecture)
    budget = search.trials_per_cell
    if study.stable_run(cell) == study.stable_run(first) and search.first_cell_trials is not None:
        budget = search.first_cell_trials
    trials = budget + search.repeats_at_optimum
    flops_per_trial = study.flops(cell)
    flops = flops_per_trial * trials
    return PlannedCell(
        name=cell.name,
        shape=_shape_words(cell),
        params_total=_known(counts.params_total),
        params_active=_known(counts.params_active),
        params_total_non_embedding=counts.params_total_non_embedding,
        params_active_non_embedding=counts.params_active_non_embedding,
        params_target=study.entry(cell).params,
        tokens=cell.tokens,
        trials=trials,
        flops_per_trial=flops_per_trial,
        flops_6nd_per_trial=counts.flops_6nd(cell.tokens),
        flops=flops,
        gpu_hours=_gpu_hours(flops),
    )


def _gpu_hours(flops: float) -> float:
    return flops / (REFERENCE_PEAK_FLOPS * REFERENCE_UTILISATION) / 3600


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shape_words(cell: Cell) -> str:
    if cell.own is not None:
        return cell.own.words
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
    from rich.console import Console  # here: on a bare machine studies are read without it
    from rich.table import Table

    console = console or Console()
    table = Table(title=f"study {plan.study}", title_justify="left", box=None, pad_edge=False)
    with_shape = console.width >= 120
    table.add_column("cell", no_wrap=True)
    if with_shape:
        table.add_column("shape", no_wrap=True)
    titles = ["active", "total", "tokens", "trials", "FLOPs/trial"]
    titles += ["6ND", "GPU-hours"] if plan.own else ["GPU-hours"]
    for title in [*titles, *(["here"] if plan.seconds else [])]:
        table.add_column(title, justify="right", no_wrap=True)
    for k, cell in enumerate(plan.cells):
        table.add_row(
            cell.name,
            *([cell.shape] if with_shape else []),
            short(cell.params_active_non_embedding),
            short(cell.params_total_non_embedding),
            short(cell.tokens),
            str(cell.trials),
            scientific(cell.flops_per_trial),
            *([scientific(cell.flops_6nd_per_trial)] if plan.own else []),
            short(cell.gpu_hours, 2),
            *([duration(plan.seconds[k])] if plan.seconds else []),
        )
    console.print(table)
    console.print(summary_words(plan), highlight=False)
    if plan.calibration is not None:
        console.print(time_words(plan), highlight=False)


def summary_words(plan: Plan) -> str:
    """The whole of a plan in a sentence or two."""
    return (
        f"{len(plan.cells)} cells, {plan.trials} trials, {scientific(plan.flops)} FLOPs, "
        f"{short(plan.gpu_hours, 2)} GPU-hours on H100s at {REFERENCE_UTILISATION:.0%} "
        f"utilisation. Parameters are non-embedding.{_budget_words(plan)}"
    )


def _budget_words(plan: Plan) -> str:
    """What `search.total_flops` makes of the trials; empty without one, or where it changes
    nothing."""
    most = plan.flops_at_most
    if plan.total_flops is None or plan.flops <= most < plan.flops + min(
        c.flops_per_trial for c in plan.cells
    ):
        return ""
    budget = f" search.total_flops of {scientific(plan.total_flops)}"
    if most > plan.flops:
        return (
            f"{budget} adds trials where they tell most, up to {scientific(most)} FLOPs and "
            f"{short(_gpu_hours(most), 2)} GPU-hours in all."
        )
    said = f"{budget} pays for {most / plan.flops:.2g} of these FLOPs: trials that no longer fit"
    said += " are left out"
    if plan.never_trained:
        said += f", all of {', '.join(plan.never_trained)}, where one costs more than that"
    return f"{said}."


def time_words(plan: Plan) -> str:
    """The time that a study takes here, and how that is known."""
    found = plan.calibration
    assert found is not None
    at_once = "one at a time" if found.slots == 1 else f"{found.slots} trials at once"
    timed = ", ".join(p.cell for p in found.paces)
    return (
        f"About {duration(plan.wall_seconds)} on this machine, {at_once} (column 'here': of one "
        f"worker). From training steps of {timed} just timed, {found.at_once} processes side by "
        "side; expect a factor of two either way."
    )
