"""The training loop on several workers through Ray Train: the one module that knows Ray here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from ray import train
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from raysweep.data.corpus import Corpus
from raysweep.data.shipping import obtain
from raysweep.results.filesystem import Storage
from raysweep.study.study import TrialSpec
from raysweep.training.outcome import TrialOutcome

RESTARTS = 3
"""How often a run may lose a worker; it goes on from its last checkpoint."""
REPORT_PERCENT = 5
"""Progress is reported each time this much more of the horizon is done."""


class WorkerReporter:
    """Hands progress to Ray Train. All workers report at the same steps, as Ray requires."""

    def __init__(self, horizon: int, stop: Callable[[], bool] | None = None) -> None:
        self._horizon = horizon
        self._stop = stop
        self._percent = 0

    def report(self, step: int, tokens: int, loss: float) -> None:
        """Report if another share of the horizon is done."""
        percent = min(100, 100 * tokens // self._horizon) // REPORT_PERCENT * REPORT_PERCENT
        if percent > self._percent:
            self._percent = percent
            progress = {"step": step, "tokens": tokens, "train_loss": loss, "percent": percent}
            train.report(progress)

    def should_stop(self) -> bool:
        """Whether the run should leave a checkpoint and end."""
        return self._stop is not None and self._stop()


def train_distributed(
    spec: TrialSpec,
    corpus: Corpus,
    *,
    checkpoints: Storage | None = None,
    storage_path: str | None = None,
    stop: Callable[[], bool] | None = None,
    branches: Callable[[], Sequence[TrialSpec]] = tuple,
    on_branch: Callable[[TrialSpec, TrialOutcome], object] | None = None,
) -> TrialOutcome:
    """Train one model on `spec.cell.resources.workers` workers, as `loop.train` does on one.

    May be called inside a Tune trial, which then sees the progress: `step`, `tokens`,
    `train_loss` and `percent` of the horizon. A run that loses a worker starts again from its
    checkpoint. The first worker asks `stop` whether to end early, and tells `on_branch` of the
    branches; `branches` says at each start which are wanted still. All three must pickle.
    `checkpoints` and `storage_path`, where Ray keeps its notes on the run, must be reachable
    from all nodes; a node that lacks the corpus fetches it from the former. Raises what the
    workers raised, as Ray's TrainingFailedError.
    """
    # Ray looks after its workers every 2 s and starts a watcher a run: too slow for short runs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    resources = spec.cell.resources
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="raysweep-") as folder:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "spec": spec,
                "corpus": corpus,
                "checkpoints": checkpoints,
                "stop": stop,
                "branches": branches,
                "on_branch": on_branch,
            },
            scaling_config=train.ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=per_worker,
            ),
            run_config=train.RunConfig(
                name=spec.key,
                storage_path=storage_path or folder,
                failure_config=train.FailureConfig(max_failures=RESTARTS),
                callbacks=_callbacks(),
            ),
        )
        result = trainer.fit()
    assert isinstance(result.return_value, TrialOutcome)
    return result.return_value


def _callbacks() -> list[Any]:
    try:
        return [TuneReportCallback()]
    except RuntimeError:  # not inside a Tune trial
        return []


def _worker(config: dict[str, Any]) -> TrialOutcome:
    from raysweep.training.loop import train as train_one  # here, so that drivers need no torch
    from raysweep.training.parallel import Workers

    resources = config["spec"].cell.resources
    corpus, storage = config["corpus"], config["checkpoints"]
    if isinstance(corpus, Corpus) and storage is not None:
        corpus = obtain(corpus, storage)  # this worker's node may not have it yet
    return train_one(
        config["spec"],
        corpus,
        reporter=WorkerReporter(config["spec"].steps * config["spec"].batch_tokens, config["stop"]),
        checkpoints=storage,
        device=get_device(),
        threads=max(1, int(resources.cpus_per_worker)),
        workers=Workers.of_process_group(resources.strategy),
        branches=config["branches"](),
        on_branch=config["on_branch"],
    )
