"""Progress of trials in TensorBoard, Weights & Biases or MLflow: one thread of the driver for all,
so that neither Tune's loop nor a trial waits for a server, and no trial needs an actor besides."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.study import Study

if TYPE_CHECKING:
    from ray.tune import Callback

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
UPLOAD_SECONDS = 60.0
"""Least time between two uploads of a running trial's TensorBoard events to an object store."""
CLOSE_SECONDS = 60.0
"""What a server gets at the end to take what it has not taken yet."""

_log = logging.getLogger("raysweep")


class Logger(Protocol):
    """Where the progress of trials goes. A trial is known by `name`: its cell and point."""

    def start(self, name: str, config: Mapping[str, Any]) -> None: ...
    def log(self, name: str, step: int, values: Mapping[str, float]) -> None: ...
    def end(self, name: str, failed: bool) -> None: ...
    def close(self) -> None: ...


def check_loggers(study: Study) -> None:
    """Raises UserError where a logger of the search space cannot be used here."""
    for name in study.space.logging:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"logging {name} needs the package {package}: pip install {package}, or drop it "
                "from logging"
            )


def make_loggers(study: Study, results: Results) -> list[Logger]:
    """The loggers that the search space asks for, under `logging`."""
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoard(results),
        "wandb": lambda: WeightsAndBiases(study.name),
        "mlflow": lambda: MLflow(study.name, results),
    }
    return [makers[name]() for name in study.space.logging]


def make_callbacks(loggers: list[Logger]) -> list[Callback]:
    """A Tune callback that tells the loggers of trials, if there are any."""
    from ray import tune
    from ray.tune.experiment import Trial
    from ray.tune.logger import LoggerCallback

    class Tell(LoggerCallback):
        def __init__(self) -> None:
            self._thread = LoggerThread(loggers)

        def __reduce__(self) -> tuple[Any, ...]:
            return tune.Callback, ()  # Tune snapshots its callbacks, and nobody reads that

        def __deepcopy__(self, memo: dict[int, Any]) -> Tell:
            return self

        def log_trial_start(self, trial: Trial) -> None:
            self._thread.put("start", name_of(trial.config), dict(trial.config))

        def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
            wanted = ("tokens", "train_loss", "loss", "seconds_train")
            values = {k: float(result[k]) for k in wanted if result.get(k) is not None}
            step = int(result.get("timesteps_total") or 0)
            self._thread.put("log", name_of(trial.config), step, values)

        def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
            self._thread.put("end", name_of(trial.config), failed)

        def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
            self._thread.close()

    return [Tell()] if loggers else []


def name_of(config: Mapping[str, Any]) -> str:
    """CELL/POINT of a trial's config."""
    return "{cell}/lr{learning_rate:.3e}-batch{batch_sequences}-seed{seed}".format(**config)


class LoggerThread:
    """Tells loggers of trials, in order, from a thread of its own. A logger that fails is told of
    nothing more: the study goes on without it."""

    def __init__(self, loggers: list[Logger]) -> None:
        self._loggers = list(loggers)
        self._told: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, name="loggers", daemon=True)
        self._thread.start()

    def put(self, what: str, *arguments: Any) -> None:
        """Have a method of each logger called."""
        self._told.put((what, *arguments))

    def close(self) -> None:
        """Return once all is told, or after a while."""
        self._told.put(("close",))
        self._thread.join(CLOSE_SECONDS)

    def _tell(self) -> None:
        what = ""
        while what != "close":
            what, *arguments = self._told.get()
            for logger in list(self._loggers):
                try:
                    getattr(logger, what)(*arguments)
                except Exception as error:
                    self._loggers.remove(logger)
                    name = type(logger).__name__
                    _log.warning("logging to %s ends here: %s", name, f"{error}"[:300])


class TensorBoard:
    """Events at RESULTS/tensorboard/CELL/POINT. Of an object store, they are written here first and
    put in place now and then."""

    def __init__(self, results: Results) -> None:
        self._storage = results.storage
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if results.storage.is_local:
            self._root = Path(results.storage.path("tensorboard"))
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="raysweep-")
            self._root = Path(self._folder.name)
        self._writers: dict[str, Any] = {}
        self._uploaded: dict[str, float] = {}

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self.end(name, False)
        self._writers[name] = SummaryWriter(str(self._root / name), flush_secs=30)
        self._uploaded[name] = time.monotonic()

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writers[name].add_scalar(key, value, step)
        if self._folder and time.monotonic() - self._uploaded[name] > UPLOAD_SECONDS:
            self._writers[name].flush()
            self._upload(name)

    def end(self, name: str, failed: bool) -> None:
        writer = self._writers.pop(name, None)
        if writer is not None:
            writer.close()
            self._upload(name)

    def close(self) -> None:
        for name in list(self._writers):
            self.end(name, False)
        if self._folder is not None:
            self._folder.cleanup()

    def _upload(self, name: str) -> None:
        self._uploaded[name] = time.monotonic()
        for path in (self._root / name).iterdir() if self._folder else ():
            self._storage.write(path.read_bytes(), "tensorboard", *name.split("/"), path.name)


class WeightsAndBiases:
    """A project a study and a run a trial, grouped by cell; WANDB_* variables hold."""

    def __init__(self, study: str) -> None:
        self._project = os.environ.get("WANDB_PROJECT", f"raysweep-{study}")
        self._runs: dict[str, Any] = {}

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        if name not in self._runs:  # else it begins again, on another worker
            cell, _, point = name.partition("/")
            self._runs[name] = wandb.init(
                project=self._project,
                group=cell,
                name=point,
                config=dict(config),
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        self._runs[name].log(dict(values), step=step)

    def end(self, name: str, failed: bool) -> None:
        if (run := self._runs.pop(name, None)) is not None:
            run.finish(exit_code=int(failed))

    def close(self) -> None:
        for name in list(self._runs):
            self.end(name, False)


class MLflow:
    """An experiment a study and a run a trial, at MLFLOW_TRACKING_URI or beside local rows."""

    def __init__(self, study: str, results: Results) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and results.storage.is_local:
            uri = f"sqlite:///{results.storage.path('mlflow.db')}"
            if importlib.util.find_spec("sqlalchemy") is None:  # as with mlflow-skinny
                uri = Path(results.storage.path("mlflow")).as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        name = f"raysweep-{study}"
        known = self._client.get_experiment_by_name(name)
        self._experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._runs: dict[str, str] = {}

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        if name not in self._runs:
            run = self._client.create_run(self._experiment, run_name=name)
            self._runs[name] = run.info.run_id
            for key, value in config.items():
                self._client.log_param(run.info.run_id, key, value)

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._runs[name], metrics=metrics)

    def end(self, name: str, failed: bool) -> None:
        if (run := self._runs.pop(name, None)) is not None:
            self._client.set_terminated(run, "FAILED" if failed else "FINISHED")

    def close(self) -> None:
        for name in list(self._runs):
            self.end(name, False)
