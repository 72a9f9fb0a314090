"""Progress of trials in TensorBoard, Weights & Biases or MLflow, through Ray's own callbacks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.study import Study

if TYPE_CHECKING:
    from ray.tune import Callback

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check_loggers(study: Study, results: Results) -> None:
    """Raises UserError where a logger of the search space cannot be used here."""
    for name in study.space.logging:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"logging {name} needs the package {package}: pip install {package}, or drop it "
                "from logging"
            )
    if "tensorboard" in study.space.logging and not results.storage.is_local:
        raise UserError(
            f"logging tensorboard writes beside the rows, and {results.uri} is no folder: use "
            "wandb or mlflow, or drop it from logging"
        )


def make_loggers(study: Study, results: Results) -> list[Callback]:
    """The callbacks that the search space asks for, under `logging`."""
    makers: dict[str, Callable[[Study, Results], Callback]] = {
        "tensorboard": _tensorboard,
        "wandb": _wandb,
        "mlflow": _mlflow,
    }
    return [makers[name](study, results) for name in study.space.logging]


def _tensorboard(study: Study, results: Results) -> Callback:
    """Events at RESULTS/tensorboard/CELL/POINT: Ray would put them among its own, soon removed."""
    from ray.tune.experiment import Trial
    from ray.tune.logger import TBXLoggerCallback

    root = Path(results.storage.path("tensorboard"))

    class Here(TBXLoggerCallback):
        def log_trial_start(self, trial: Trial) -> None:
            self.log_trial_end(trial)
            config = trial.config
            point = "lr{learning_rate:.3e}-batch{batch_sequences}-seed{seed}".format(**config)
            folder = root / config["cell"] / point
            self._trial_writer[trial] = self._summary_writer_cls(str(folder), flush_secs=30)
            self._trial_result[trial] = {}

    return Here()


def _wandb(study: Study, results: Results) -> Callback:
    """A project a study; WANDB_* variables hold."""
    from ray.air.integrations.wandb import WandbLoggerCallback

    return WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", f"raysweep-{study.name}"))


def _mlflow(study: Study, results: Results) -> Callback:
    """An experiment a study, at MLFLOW_TRACKING_URI or beside local rows."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and results.storage.is_local:
        uri = Path(results.storage.path("mlflow")).as_uri()
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name=f"raysweep-{study.name}")
