"""Runs of W&B, MLflow, Optuna, Ray Tune and LossCast: each by the real library, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.results.importers import Imported, read_source
from raysweep.results.store import Results

RATES = (1e-3, 2e-3, 4e-3)
STEPS = 100
CONFIG = {
    "batch_size": 64,
    "max_steps": STEPS,
    "seq_len": 1024,
    "n_params": 1e7,
    "optimizer": "adamw",
    "note": "kept aside",
}


def loss(rate: float, step: int) -> float:
    return 3 + abs(np.log(rate / 2e-3)) + 2 * np.exp(-step / 20)


def check(found: Imported, format: str, curves: bool = True) -> None:
    """What must come of three runs over `RATES`, however they were kept."""
    rows = found.rows[found.rows["excluded"].isna()].sort_values("learning_rate")
    assert list(rows["learning_rate"]) == pytest.approx(RATES)
    assert list(rows["loss"]) == pytest.approx([loss(r, STEPS) for r in RATES])
    assert set(rows["tokens"]) == {64 * 1024 * STEPS}
    assert set(rows["batch_tokens"]) == {64 * 1024}
    assert set(rows["params_active_non_embedding"]) == {1e7}
    assert {json.loads(text)["optimizer"] for text in rows["recipe"]} == {"adamw"}
    assert set(rows["source"]) == {f"import:{format}"}
    assert "note" in found.ignored
    assert any("steps x batch" in note for note in found.notes)
    if curves:
        own = found.curves[found.curves["trial_key"] == rows["trial_key"].iloc[0]]
        assert list(own["step"]) == list(range(0, STEPS + 1, 20))
        assert list(own["train_loss"]) == pytest.approx([loss(RATES[0], s) for s in own["step"]])
        assert own["tokens"].iloc[-1] == 64 * 1024 * STEPS


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file store, as `mlruns` folders have it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    store = tmp_path / "mlruns"
    client = MlflowClient(str(store))
    experiment = client.create_experiment("sweep")
    for rate in (*RATES, 8e-3):
        run = client.create_run(experiment).info.run_id
        for name, value in {**CONFIG, "lr": rate}.items():
            client.log_param(run, name, value)
        for step in range(0, STEPS + 1, 20):
            client.log_metric(run, "eval/loss", loss(rate, step), step=step)
        client.set_terminated(run, "FAILED" if rate == 8e-3 else "FINISHED")
    client.create_run(experiment)  # goes on
    found = read_source("mlflow", str(store))
    assert sorted(found.rows["status"]) == ["crashed", *["finished"] * 3]
    done = found.rows["status"] == "finished"
    check(Imported(**{**vars(found), "rows": found.rows[done]}), "mlflow")
    assert set(found.rows["study"]) == {"sweep"}
    assert any("1 run not over" in note for note in found.notes)
    results = Results.open(tmp_path / "results", create=True)
    assert results.write_many(found.rows, found.curves) == 4
    assert len(results.curves()) == len(found.curves) == 24
    with pytest.raises(UserError, match=r"no experiment 'other' in .*; known: "):
        read_source("mlflow", f"{store}#other")
    with pytest.raises(UserError, match=r"nothing\.db not found"):
        read_source("mlflow", f"sqlite:///{tmp_path}/nothing.db")


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_optuna(tmp_path: Path, kind: str) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = tmp_path / f"optuna.{kind}"
    url = f"sqlite:///{path}"
    storage = url if kind == "sqlite" else JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(study_name="mine", storage=storage, direction="minimize")
    for name, value in CONFIG.items():
        study.set_user_attr(name, value)
    for rate in RATES:
        study.enqueue_trial({"lr": rate})

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        for step in range(0, STEPS + 1, 20):
            trial.report(loss(rate, step), step)
        return loss(rate, STEPS)

    study.optimize(objective, n_trials=3)
    for place in {str(path), url if kind == "sqlite" else str(path)}:
        check(read_source("optuna", place), "optuna")
    with pytest.raises(UserError, match=r"no study 'other' in .*; known: mine"):
        read_source("optuna", f"{path}#other")
    with pytest.raises(UserError, match="not found"):
        read_source("optuna", str(tmp_path / "nothing.db"))


_TUNE = """
import sys
import numpy as np
import ray
from ray import tune

ray.init(address="local", num_cpus=2, include_dashboard=False)  # not another test's

def train(config):
    for step in range(0, 101, 20):
        off = abs(np.log(config["lr"] / 2e-3))
        tune.report({"val_loss": 3 + off + 2 * np.exp(-step / 20), "step": step})

import json
space = {**json.loads(sys.argv[2]), "lr": tune.grid_search([1e-3, 2e-3, 4e-3])}
failures = tune.FailureConfig(max_failures=3)  # a busy machine may lose a worker
config = tune.RunConfig("sweep", sys.argv[1], failure_config=failures)
assert not tune.Tuner(train, param_space=space, run_config=config).fit().errors
"""


@pytest.mark.ray
def test_ray(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TUNE, str(tmp_path), json.dumps(CONFIG)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=env
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_source("ray", str(tmp_path / "sweep"))
    check(found, "ray")
    assert set(found.rows["study"]) == {"sweep"}


def test_losscast(tmp_path: Path) -> None:
    """Its documented form: `docs/data.md` of LossCast-Bench."""
    for rate in RATES:
        folder = tmp_path / "train" / f"me_{rate}"
        folder.mkdir(parents=True)
        config = {
            "run_id": folder.name,
            "model": {"n_layers": 4, "d_model": 256, "n_heads": 4, "d_ff": None,
                      "vocab_size": 32000, "activation": "gelu"},
            "optimizer": {"name": "adamw", "lr": rate, "weight_decay": 0.1},
            "data": {"eval_dataset": "c4", "tokenizer": "gpt2", "seq_len": 1024,
                     "batch_tokens": 65536, "tokens_total": 65536 * STEPS},
            "schedule": {"lr_schedule": "cosine", "total_steps": STEPS, "warmup_steps": 10},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        curve = {str(step): loss(rate, step) for step in range(0, STEPS + 1, 20)}
        (folder / "losses.json").write_text(json.dumps(curve))
    found = read_source("losscast", str(tmp_path))
    rows = found.rows.sort_values("learning_rate")
    assert rows["excluded"].isna().all()
    assert list(rows["loss"]) == pytest.approx([loss(r, STEPS) for r in RATES])
    # 4 layers of 4 d^2 of attention, two matrices of 4 d, and the norms' gains
    size = 4 * (12 * 256**2 + 2 * 256) + 256
    assert list(rows["params_active_non_embedding"]) == pytest.approx([size] * 3, rel=1e-3)
    assert list(rows["params_total"]) == pytest.approx([size + 2 * 256 * 32000] * 3, rel=1e-3)
    assert set(rows["data_hash"]) == {"c4, gpt2"}
    recipe = json.loads(rows["recipe"].iloc[0])
    assert recipe == {
        "optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1, "warmup_steps": 10,
        "activation": "gelu",
    }  # fmt: skip
    assert len(found.curves) == 18


class _Server(BaseHTTPRequestHandler):
    """The queries of W&B's public API that its client asks for the runs of a project."""

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        asked = self.rfile.read(length)
        body = json.dumps({"data": _answer(json.loads(asked)) if asked[:1] == b"{" else {}})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def _answer(asked: dict) -> dict:
    query, variables = asked["query"], asked.get("variables") or {}
    if "viewer" in query:
        return {"viewer": {"id": "VXNlcjox", "entity": "me", "username": "me", "email": "m@e.org",
                           "flags": "{}", "teams": {"edges": []}}}  # fmt: skip
    if variables.get("project") != "sweep":
        return {"project": None}
    if "history(samples" in query:
        rate = float(variables["name"])
        points = [{"_step": s, "step": s, "val/loss": loss(rate, s)} for s in range(0, 101, 20)]
        return {"project": {"run": {"history": [json.dumps(p) for p in points]}}}
    runs = [_run(rate, "finished") for rate in RATES] + [_run(8e-3, "running")]
    edges = [{"node": run, "cursor": str(k)} for k, run in enumerate(runs)]
    page = {"edges": edges, "pageInfo": {"endCursor": "3", "hasNextPage": False}}
    return {"project": {"internalId": "1", "runCount": 4, "readOnly": True, "runs": page}}


def _run(rate: float, state: str) -> dict:
    config = {k: {"value": v} for k, v in {**CONFIG, "model": {"lr": rate}}.items()}
    last = {"_step": 900, "_runtime": 5, "step": STEPS, "val/loss": loss(rate, STEPS)}
    return {
        "projectId": "1", "id": str(rate), "name": str(rate), "displayName": f"lr {rate}",
        "state": state, "tags": [], "createdAt": "2026-01-01T00:00:00", "sweepName": None,
        "heartbeatAt": None, "description": "", "notes": "", "group": None, "jobType": None,
        "historyLineCount": 6, "readOnly": True, "eventsLineCount": 0, "historyKeys": None,
        "user": {"name": "me", "username": "me"}, "config": json.dumps(config),
        "summaryMetrics": json.dumps(last), "systemMetrics": "{}",
    }  # fmt: skip


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    server.shutdown()


@pytest.mark.slow
def test_wandb(wandb_server: None) -> None:
    """Its real client, asking a server of its own on this machine."""
    found = read_source("wandb", "me/sweep")
    check(found, "wandb")
    assert set(found.rows["study"]) == {"sweep"}
    assert found.guessed["learning_rate"] == "model.lr"
    assert any("1 run not over" in note for note in found.notes)
    assert not len(read_source("wandb", "me/sweep", curves=False).curves)
    with pytest.raises(UserError, match="the W&B project me/other cannot be read") as error:
        read_source("wandb", "me/other")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="name a W&B project as ENTITY/PROJECT"):
        read_source("wandb", "sweep")


@pytest.mark.parametrize("library", ["wandb", "mlflow", "optuna"])
def test_a_library_that_is_missing_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{library} is not installed here: pip install {library}"):
        read_source(library, "a/b")


@pytest.mark.parametrize("format", ["ray", "losscast"])
def test_a_folder_without_runs_is_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(UserError, match="holds no finished run"):
        read_source(format, str(tmp_path))
