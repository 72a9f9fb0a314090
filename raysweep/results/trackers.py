"""Runs that other tools keep: W&B, MLflow, Optuna, Ray Tune and LossCast, as tables and curves.

Each library is imported where its runs are read, and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.errors import UserError
from raysweep.results.mapping import COMMON_NAMES

RUN, STUDY, STATUS = "run_id", "study", "status"
CURVE_POINTS = 500
"""Points of a curve, at most."""
_OVER = {"finished": "finished", "failed": "crashed", "crashed": "crashed", "killed": "stopped"}


@dataclass(frozen=True)
class Tracked:
    """The runs of a tracker: `table` has a row each (`run_id`, `study`, `status`, its settings and
    its last metrics under the tracker's names), `curves` a row a point, with `run_id` and `step`;
    `running` runs were left out, as they are not over."""

    table: pd.DataFrame
    curves: pd.DataFrame
    running: int = 0


def read_wandb(place: str, curves: bool = True) -> Tracked:
    """The runs of a W&B project, ENTITY/PROJECT. A curve costs a request a run.

    Raises:
        UserError: W&B is not installed, or there is no such project for this login.
    """
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    if place.count("/") != 1:
        raise UserError(f"{place}: name a W&B project as ENTITY/PROJECT")
    found: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    running = 0
    try:
        for run in wandb.Api().runs(place, lazy=False):
            state = str(run.state).lower()
            if state not in _OVER:
                running += 1
                continue
            last = {k: v for k, v in dict(run.summary_metrics).items() if not k.startswith("_")}
            found.append(
                {RUN: run.id, STUDY: place.split("/")[1], STATUS: _OVER[state]}
                | _flat(run.config)
                | _flat(last)
            )
            if curves:
                points += _points(run.id, run.history(CURVE_POINTS, pandas=False), "_step")
    except Exception as error:  # its client raises whatever its transport does
        raise _unread(f"the W&B project {place}", error) from None
    return _tracked(found, points, running, place)


def read_mlflow(place: str, curves: bool = True) -> Tracked:
    """The runs of an MLflow tracking URI, or folder of its file store: of all its experiments, or
    of the one after `#`.

    Raises:
        UserError: MLflow is not installed, or the URI tells of no run.
    """
    try:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # we only read, also old stores
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise _missing("mlflow", "mlflow-skinny") from None
    uri, _, wanted = place.partition("#")
    _check_sqlite(uri)
    if "://" not in uri and not Path(uri).is_dir():
        raise UserError(f"{uri} not found: give a tracking URI, or the folder mlruns")
    found: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    running = 0
    try:
        client = MlflowClient(uri)
        names = {e.experiment_id: e.name for e in _pages(client.search_experiments)}
        chosen = [i for i, name in names.items() if wanted in ("", name)]
        for run in _pages(client.search_runs, experiment_ids=chosen) if chosen else ():
            state = {"FINISHED": "finished", "FAILED": "crashed", "KILLED": "stopped"}.get(
                run.info.status
            )
            if state is None:
                running += 1
                continue
            key = run.info.run_id
            found.append(
                {RUN: key, STUDY: names[run.info.experiment_id], STATUS: state}
                | run.data.params
                | run.data.metrics
            )
            for name in run.data.metrics if curves else ():
                if _of_curve(name):
                    history = client.get_metric_history(key, name)
                    points += [{RUN: key, "step": m.step, name: m.value} for m in history]
    except Exception as error:  # stores raise what their databases and servers do
        raise _unread(f"the MLflow store {uri}", error) from None
    if not chosen:
        raise UserError(f"no experiment {wanted!r} in {uri}; known: {', '.join(names.values())}")
    return _tracked(found, points, running, place)


def read_optuna(place: str, curves: bool = True) -> Tracked:
    """The trials of an Optuna storage (a URL, an SQLite file or a journal): of all its studies, or
    of the one after `#`. The objective is the loss.

    Raises:
        UserError: Optuna is not installed, or the storage tells of no trial.
    """
    try:
        import optuna
    except ImportError:
        raise _missing("optuna") from None
    uri, _, wanted = place.partition("#")
    _check_sqlite(uri)
    found: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    running = 0
    try:
        storage = _optuna_storage(uri)
        names = [s.study_name for s in optuna.get_all_study_summaries(storage)]
        for name in (n for n in names if wanted in ("", n)):
            study = optuna.load_study(study_name=name, storage=storage)
            for trial in study.trials:
                state = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "crashed"}.get(
                    trial.state.name
                )
                if state is None:
                    running += 1
                    continue
                key = f"{name}/{trial.number}"
                row = {RUN: key, STUDY: name, STATUS: state} | _flat(study.user_attrs)
                row |= _flat(trial.user_attrs) | trial.params
                if trial.values:
                    row["loss"] = trial.values[0]
                found.append(row)
                steps = trial.intermediate_values.items() if curves else ()
                points += [{RUN: key, "step": step, "loss": value} for step, value in steps]
    except UserError:
        raise
    except Exception as error:  # storages raise what their databases do
        raise _unread(f"the Optuna storage {uri}", error) from None
    if wanted and wanted not in names:
        raise UserError(f"no study {wanted!r} in {uri}; known: {', '.join(names) or 'none'}")
    return _tracked(found, points, running, place)


def read_ray(place: str, curves: bool = True) -> Tracked:
    """The trials of a results folder of Ray Tune, or of several in one folder: what each trial
    writes there (`params.json`, `result.json`), which needs no Ray and no pickle.

    Raises:
        UserError: no trial in the folder.
    """
    root = Path(place)
    found: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for path in sorted(root.rglob("result.json")) if root.is_dir() else ():
        results = [line for line in _json_lines(path) if isinstance(line, dict)]
        if not results:
            continue
        last, key = results[-1], str(path.parent.relative_to(root))
        settings = last.get("config") or _json(path.with_name("params.json")) or {}
        metrics = {k: v for k, v in last.items() if k not in _TUNES_OWN}
        over = "crashed" if path.with_name("error.txt").exists() else "finished"
        study = path.parent.parent.name or root.resolve().name
        found.append({RUN: key, STUDY: study, STATUS: over} | _flat(settings) | _flat(metrics))
        if curves:
            points += _points(key, results, "training_iteration")
    return _tracked(found, points, 0, place)


def read_losscast(place: str, curves: bool = True) -> Tracked:
    """Runs in LossCast-Bench's form: a folder each, with `config.json` and `losses.json`.

    The last loss of the curve is the run's; `data.eval_dataset` says on what it was measured. The
    count of parameters comes from the shape.

    Raises:
        UserError: no such folder of a run.
    """
    root = Path(place)
    found: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for path in sorted(root.rglob("config.json")) if root.is_dir() else ():
        config, losses = _json(path), _json(path.with_name("losses.json"))
        if not isinstance(config, dict) or not isinstance(losses, dict):
            continue
        losses = losses.get("losses", losses)
        curve = sorted((int(s), v) for s, v in losses.items() if isinstance(v, int | float))
        if not curve:
            continue
        key = str(config.get("run_id") or path.parent.name)
        row = {RUN: key, STUDY: root.resolve().name, STATUS: "finished"} | _flat(config)
        row |= {"loss": curve[-1][1], "step": curve[-1][0]}
        name = row.pop("optimizer.name", None)
        row["optimizer"] = name
        row["dataset"] = ", ".join(
            str(row[k]) for k in ("data.eval_dataset", "data.tokenizer") if row.get(k)
        )
        found.append(row)
        step = max(1, math.ceil(len(curve) / CURVE_POINTS))
        if curves:
            points += [{RUN: key, "step": s, "train_loss": v} for s, v in curve[::step]]
    return _tracked(found, points, 0, place)


TRACKERS: dict[str, Callable[[str, bool], Tracked]] = {
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "optuna": read_optuna,
    "ray": read_ray,
    "losscast": read_losscast,
}
"""By the name that `raysweep import` takes."""

_TUNES_OWN = (
    "config", "timestamp", "date", "time_this_iter_s", "time_total_s", "pid", "hostname",
    "node_ip", "time_since_restore", "iterations_since_restore", "trial_id", "experiment_tag",
    "checkpoint_dir_name", "should_checkpoint", "done", "experiment_id", "timesteps_total",
    "episodes_total", "timesteps_since_restore", "warmup_time",
)  # fmt: skip


def _tracked(
    found: list[dict[str, Any]], points: Iterable[Mapping[str, Any]], running: int, place: str
) -> Tracked:
    if not found:
        more = f" ({running} are still running)" if running else ""
        raise UserError(f"{place} holds no finished run{more}: check the name")
    return Tracked(pd.DataFrame(found), pd.DataFrame(list(points)), running)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Plain values by their path (`model.n_layers`); lists and other objects are left out."""
    flat: dict[str, Any] = {}
    for key, value in dict(values).items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif value is None or isinstance(value, str | int | float | bool):
            flat[f"{before}{key}"] = value
    return flat


_CURVE_NAMES = {n for c in ("train_loss", "loss", "learning_rate") for n in COMMON_NAMES[c]}
_CURVE_NAMES |= {"grad_norm", "gradient_norm"}


def _of_curve(name: str) -> bool:
    return name.lower().replace("/", "_").replace(".", "_") in _CURVE_NAMES


def _points(key: str, history: Iterable[Mapping[str, Any]], step: str) -> Iterator[dict[str, Any]]:
    """The numbers of a run's history that a curve is made of."""
    for at, each in enumerate(history):
        known = {
            name: value
            for name, value in each.items()
            if _of_curve(name) and isinstance(value, int | float)
        }
        if known:
            yield {RUN: key, "step": each.get("step", each.get(step, at)), **known}


def _pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def _optuna_storage(uri: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in uri:
        return uri
    path = Path(uri)
    if not path.is_file():
        raise UserError(f"{uri} not found: give a storage URL, an SQLite file or a journal")
    with path.open("rb") as file:
        if file.read(6) == b"SQLite":
            return f"sqlite:///{path}"
    return JournalStorage(JournalFileBackend(str(path)))


def _check_sqlite(uri: str) -> None:
    """Opening a database that is not there would make it."""
    _, slashes, path = uri.partition("sqlite:///")
    if slashes and not Path(path).is_file():
        raise UserError(f"{path} not found: check the path in {uri}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> Iterator[Any]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # a line that a kill cut off


def _missing(library: str, package: str = "") -> UserError:
    return UserError(f"{library} is not installed here: pip install {package or library}")


def _unread(what: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"{what} cannot be read: {lines[0][:200]}")
