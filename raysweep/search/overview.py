"""How a running study goes, for a team: what it has cost, what is to come, and what runs where."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from raysweep.search.scheduler import StudyScheduler

GAUGES = {
    "raysweep_trials": ("Trials by cell and state: running, done or wanted.", ("cell", "state")),
    "raysweep_gpu_hours": ("GPU-hours of trials, so far and to come.", ("when",)),
    "raysweep_cost": ("The same by the price of a GPU-hour.", ("when",)),
    "raysweep_seconds_left": ("Until the study ends, as estimated.", ()),
    "raysweep_gpu_use": ("Share of the cluster's GPUs that trials hold.", ()),
    "raysweep_best_loss": ("Least loss of a cell so far.", ("cell",)),
}
"""Metrics of the driver by name, each with its meaning and its tags besides `study`. Ray's
exporters put `ray_` before the names."""


def overview(scheduler: StudyScheduler) -> dict[str, Any]:
    """Plain values: when, GPU-hours and cost so far and to come, seconds left, the share of GPUs
    that trials hold, and by cell the trials running, done and wanted, and the best loss."""
    spent, to_come = scheduler.gpu_hours
    price = scheduler.study.space.price_per_gpu_hour
    gpus = scheduler.pool.total("GPU")
    free = sum(left.get("GPU", 0.0) for left in scheduler.pool.free.values())
    cells = {}
    for name, state in scheduler.states.items():
        best = state.best
        cells[name] = {
            "running": len(state.running),
            "done": state.concluded,
            "wanted": state.wanted,
            "best_loss": best.value if best else None,
        }
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu_hours": spent,
        "gpu_hours_to_come": to_come,
        "cost": None if price is None else price * spent,
        "cost_to_come": None if price is None else price * to_come,
        "seconds_left": scheduler.seconds_left,
        "gpu_use": 1 - free / gpus if gpus else None,
        "cells": cells,
    }


class Gauges:
    """The overview as metrics that Ray exports to Prometheus."""

    def __init__(self, study: str) -> None:
        from ray.util.metrics import Gauge

        self._study = study
        self._gauges = {
            name: Gauge(name, description=meaning, tag_keys=("study", *tags))
            for name, (meaning, tags) in GAUGES.items()
        }

    def set(self, now: Mapping[str, Any]) -> None:
        """Show an overview."""
        for when, suffix in (("so far", ""), ("to come", "_to_come")):
            self._show("raysweep_gpu_hours", now[f"gpu_hours{suffix}"], when=when)
            self._show("raysweep_cost", now[f"cost{suffix}"], when=when)
        self._show("raysweep_seconds_left", now["seconds_left"])
        self._show("raysweep_gpu_use", now["gpu_use"])
        for cell, each in now["cells"].items():
            for state in ("running", "done", "wanted"):
                self._show("raysweep_trials", each[state], cell=cell, state=state)
            self._show("raysweep_best_loss", each["best_loss"], cell=cell)

    def _show(self, name: str, value: float | None, **tags: str) -> None:
        if value is not None:
            self._gauges[name].set(value, tags={"study": self._study, **tags})
