"""Ask and tell without Ray: the proposals of a run, from any number of processes at once."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from raysweep.cli import app, main
from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.pending import read_pending, tell
from raysweep.results.progress import progress
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import StudyScheduler
from raysweep.search.sweep import Sweep
from raysweep.study import Study

REPO = Path(__file__).resolve().parents[2]


def space(trials: int, strategy: str = "ladder", **search: Any) -> dict[str, Any]:
    return {
        "study": "asked",
        "training": {"external": True, "settings": {"optimizer": "muon"}},
        "model": {"sequence_length": 64},
        "scales": [
            {"name": "s", "settings": {"n": 2}, "params": 1e6, "flops_per_token": 7e6},
            {"name": "m", "settings": {"n": 4}, "params": 4e6, "flops_per_token": 3e7},
        ],
        "horizons": [{"tokens_per_param": 10}],
        "search": {"strategy": strategy, "trials_per_cell": trials, **search},
    }


def loss(learning_rate: float, batch_tokens: float, tokens: float) -> float:
    return 2.5 + (1e6 / tokens) ** 0.3 + 0.05 * math.log(learning_rate / 0.004) ** 2 \
        + 0.02 * math.log(batch_tokens / 2048) ** 2  # fmt: skip


def told(sweep: Sweep, **more: Any) -> tuple[float, ...] | None:
    trial = sweep.ask()
    if trial is None:
        return None
    sweep.tell(trial, loss(trial.learning_rate, trial.batch_tokens, trial.tokens), **more)
    further = trial.settings.get("weight_decay", 0.0)
    return trial.learning_rate, trial.batch_sequences, trial.seed, further


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ladder", "qmc", "tpe", "gp", "cmaes"])
def test_proposals_are_those_of_a_run_on_one_worker(strategy: str, tmp_path: Path) -> None:
    """Also where a range is widened, points are repeated and more is searched."""
    also = {"weight_decay": {"low": 0.01, "high": 1.0}}
    study = Study.from_dict(space(4, strategy, repeats_at_optimum=1, also=also))
    live = StudyScheduler(study, study.own_data, ResourcePool({"here": {"CPU": 1.0}}))
    wanted = []
    while (proposal := live.ask(f"t{len(wanted)}")) is not None:
        spec = proposal.spec
        wanted.append(
            (spec.learning_rate, spec.batch_sequences, spec.seed, *dict(spec.also).values())
        )
        value = loss(spec.learning_rate, spec.batch_tokens, spec.cell.tokens)
        live.tell(proposal.id, "finished", value)
    found = []
    while True:  # a new Sweep each time: nothing is kept in memory
        with Sweep(study, str(tmp_path / "results")) as sweep:
            one = told(sweep)
        if one is None:
            break
        found.append(one)
    assert sweep.done
    assert found == wanted
    assert len(found) >= 10


def test_rows_are_those_of_any_trial(tmp_path: Path) -> None:
    uri = str(tmp_path / "results")
    with Sweep(Study.from_dict(space(2)), uri) as sweep:
        trial = sweep.ask()
        assert trial is not None
        assert trial.settings["n"] == 2
        assert trial.tokens == 10_000_000
        sweep.tell(trial, 3.0, loss_se=0.01, grad_skips=2)
        other = sweep.ask()
        assert other is not None
        sweep.tell(other, float("nan"))
    frame = Results.open(uri).to_pandas()
    assert frame["status"].tolist() == ["finished", "diverged"]
    first = frame.iloc[0]
    assert (first["loss"], first["loss_se"], first["metrics"]) == (3.0, 0.01, '{"grad_skips": 2}')
    assert first["flops"] == 7e6 * first["tokens_seen"]
    assert json.loads(first["recipe"]) == {"training": "external", "optimizer": "muon"}
    assert not read_pending(Results.open(uri).storage, "asked")
    with pytest.raises(UserError, match="was told already"):
        sweep.tell(trial, 2.0)


def test_what_is_measured_may_be_any_librarys_numbers(tmp_path: Path) -> None:
    uri = str(tmp_path / "results")
    with Sweep(Study.from_dict(space(2)), uri, expires=3600) as sweep:
        trial = sweep.ask()
        assert trial is not None
        kept = {"accuracy": np.float32(0.5), "skips": np.int64(2), "lost": math.nan}
        kept |= {"peak_memory_bytes": 1e9, "device": "A100", "loss_se": np.float64(0.1)}
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"loss": 3.0, "device": 3.0}, "device 3.0: it is a text"),
            ({"loss": 3.0, "loss_se": "low"}, "loss_se 'low' is no number"),
            ({"loss": 3.0, "accuracy": [1, 2]}, r"accuracy \[1, 2\] is no number"),
            ({"loss": "low"}, "loss 'low' is no number"),
            ({"loss": 3.0, "status": "done"}, "status 'done' .* none of finished, diverged"),
        ]
        for given, says in wrong:
            with pytest.raises(UserError, match=says):
                sweep.tell(trial, **given)
        sweep.tell(trial, np.float32(3.5), **kept)  # pyright: ignore[reportArgumentType]
    (row,) = Results.open(uri).to_pandas().to_dict("records")
    assert (row["loss"], row["loss_se"], row["device"]) == (3.5, 0.1, "A100")
    assert row["peak_memory_bytes"] == 1e9
    assert json.loads(row["metrics"]) == {"accuracy": 0.5, "skips": 2}
    for never in (math.nan, -1.0, 1e20):
        with pytest.raises(UserError, match=r"expires .* from 0 s to 3650 days"):
            Sweep(Study.from_dict(space(2)), uri, expires=never)


def test_losses_that_cannot_be_are_refused_and_where_they_stand_counted_as_diverged(
    tmp_path: Path,
) -> None:
    uri = str(tmp_path / "results")
    study = Study.from_dict(space(2))
    with Sweep(study, uri) as sweep:
        trial = sweep.ask()
        assert trial is not None
        for none in (0.0, -5.0):
            with pytest.raises(UserError, match="it must be positive"):
                sweep.tell(trial, none)
        sweep.tell(trial, 3.0)
        results = Results.open(uri)
        row = results.find(trial.id.removeprefix("asked-"), "asked")
        assert row is not None
        results.write({**row, "loss": 0.0})
        results.write({**row, "study": "other", "loss": -1.0})
        while told(sweep):
            pass
        assert sweep.done
    frame = results.to_pandas("asked")
    assert (frame["loss"] > 0).groupby(frame["cell"]).sum().tolist() == [2, 2]


def test_pending_trials_are_counted_until_they_expire(tmp_path: Path) -> None:
    uri = str(tmp_path / "results")
    study = Study.from_dict(space(3))
    with Sweep(study, uri) as sweep:
        asked = sweep.ask_many(100)
        assert len(asked) == 6
        assert len({(t.scale, t.learning_rate, t.batch_tokens, t.seed) for t in asked}) == 6
        assert sweep.ask() is None
        assert not sweep.done
    assert [cell.running for cell in progress(uri)] == [3, 3]
    late = tmp_path / "late"
    with Sweep(study, str(late), expires=timedelta(0)) as sweep:
        first, second = sweep.ask(), sweep.ask()
    assert first is not None
    assert second is not None
    assert [cell.running for cell in progress(str(late))] == [None, None]
    assert first.id == second.id  # given up, and handed out again
    tell(first.id, results_uri=str(late), loss=3.0)
    assert len(Results.open(late).to_pandas()) == 1


@pytest.mark.slow
def test_cells_whose_trials_fail_are_given_up(tmp_path: Path) -> None:
    uri = str(tmp_path / "results")
    study = Study.from_dict(space(4))
    points = set()
    with Sweep(study, uri) as sweep:
        for _ in range(6):
            trial = sweep.ask()
            assert trial is not None
            points.add((trial.scale, trial.learning_rate, trial.batch_tokens))
            sweep.tell(trial, status="crashed", reason="no such optimizer")
        assert sweep.ask() is None
        assert sweep.done
    assert len(points) == 6  # not the same one again and again
    for _ in range(2):  # each time it is asked for anew, they are tried once more
        again = []
        while len(again) < 20:
            with Sweep(study, uri, retry_crashed=True) as sweep:  # as a shell loop has it
                trial = sweep.ask()
            if trial is None:
                break
            again.append(trial.id)
            sweep.tell(trial, status="crashed", reason="no such optimizer")
        assert sweep.done
        assert len(set(again)) == len(again) == 6


@pytest.mark.slow
def test_cells_whose_trials_diverge_end_as_in_a_run_on_one_worker(tmp_path: Path) -> None:
    """Where all diverges, the search keeps to one corner of its range."""
    narrow: dict[str, Any] = {"learning_rate": {"low": 1e-3, "high": 1e-2}}
    narrow |= {"batch_sequences": {"low": 16, "high": 64}}
    study = Study.from_dict(space(4, repeats_at_optimum=1, extend_edges=False, **narrow))
    seeds = []
    with Sweep(study, str(tmp_path / "results")) as sweep:
        while (trial := sweep.ask()) and len(seeds) < 30:
            seeds.append(trial.seed)
            sweep.tell(trial, status="diverged")
    assert sweep.done
    assert len(seeds) == 2 * 2 * 4
    assert max(seeds) > 1


CLIENT = """
import json, subprocess, sys, time
sys.path.insert(0, {repo!r})
from tests.search.test_sweep import loss
from raysweep.search.sweep import Sweep
with Sweep({space!r}, {uri!r}) as sweep:
    while True:
        trial = sweep.ask()
        if trial is None and sweep.done:
            break
        if trial is None:
            time.sleep(0.2)
            continue
        print(trial.id, flush=True)
        sweep.tell(trial, loss(trial.learning_rate, trial.batch_tokens, trial.tokens))
"""


@pytest.mark.slow
def test_four_processes_ask_and_tell_sixty_trials(tmp_path: Path) -> None:
    """None handed out twice, no row lost."""
    path, uri = tmp_path / "asked.yaml", str(tmp_path / "results")
    path.write_text(yaml.safe_dump(space(30, "tpe", extend_edges=False)))
    code = CLIENT.format(repo=str(REPO), space=str(path), uri=uri)
    pipe = subprocess.PIPE
    clients = [
        subprocess.Popen([sys.executable, "-c", code], stdout=pipe, text=True, cwd=REPO)
        for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        said = [out for out, _ in pool.map(lambda c: c.communicate(timeout=300), clients)]
    assert [client.returncode for client in clients] == [0] * 4
    ids = [name for text in said for name in text.split()]
    assert len(ids) == len(set(ids)) == 60
    frame = Results.open(uri).to_pandas()
    assert sorted(f"asked-{key}" for key in frame["trial_key"]) == sorted(ids)
    assert set(frame["status"]) == {"finished"}
    assert frame.groupby("cell").size().tolist() == [30, 30]
    assert frame[["learning_rate", "batch_tokens", "cell"]].drop_duplicates().shape[0] == 60


def test_a_setting_called_id_does_not_stand_for_that_of_the_trial(tmp_path: Path) -> None:
    path, uri = tmp_path / "asked.yaml", str(tmp_path / "results")
    training = {"function": "lab:train", "settings": {"id": "mine"}}
    path.write_text(yaml.safe_dump(space(1) | {"training": training}))
    done = CliRunner().invoke(app, ["ask", str(path), "--results", uri])
    assert json.loads(done.stdout)["id"].startswith("asked-")


@pytest.mark.slow
def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell loop uses them; the first in a process of its own, which takes seconds."""
    path = tmp_path / "asked.yaml"
    path.write_text(yaml.safe_dump(space(1)))
    monkeypatch.chdir(tmp_path)

    def raysweep(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["raysweep", *words])
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    asked = subprocess.run(
        [sys.executable, "-m", "raysweep", "ask", str(path), "-n", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin", "PYTHONPATH": str(REPO), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    first, second = map(json.loads, asked.stdout.splitlines())
    assert first["optimizer"] == "muon"
    nothing = raysweep("ask", str(path))
    assert (nothing.returncode, nothing.stdout) == (75, "")
    assert raysweep("tell", first["id"], "--loss", "3.2", "--with", "loss_se=0.1").returncode == 0
    wrong = raysweep("tell", second["id"], "--loss", "3", "--diverged")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: say one of")
    unknown = raysweep("tell", "asked-1234", "--loss", "3")
    assert "no trial asked-1234 was handed out in results/asked" in unknown.stderr
    assert "1234 is no trial's id" in raysweep("tell", "1234", "--loss", "3").stderr
    assert raysweep("tell", second["id"], "--failed", "no GPU").returncode == 0
    shell = raysweep("ask", str(path), "--shell")
    assert f"learning_rate={json.loads(asked.stdout.splitlines()[1])['learning_rate']}" not in (
        shell.stdout
    )
    assert " n=4 " in shell.stdout
    assert raysweep("tell", shell.stdout.split()[0].split("=")[1], "--loss", "3").returncode == 0
    done = raysweep("ask", str(path), "--wait")
    assert (done.returncode, done.stdout) == (0, "")
    frame = Results.open(tmp_path / "results/asked").to_pandas()
    assert sorted(frame["status"]) == ["crashed", "finished", "finished"]
