"""Studies submitted to a real cluster: refused, stopped, continued, through the loss of a node."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.nodes import TRAIN_WORKER, Node, in_trial
from raysweep.results import Results
from raysweep.study import Study
from raysweep.training.single import train_one

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
SMOKE = str(REPO / "search_spaces/smoke.yaml")


def raysweep(
    *args: str, env: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raysweep", *args],
        capture_output=True,
        text=True,
        cwd=cwd or REPO,
        env=env,
        timeout=200,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed as a user's mistake fails: exit code 2 and a single line that says what."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_submitted_stopped_and_continued_to_the_end(cluster, tmp_path: Path) -> None:
    def call(*args: str) -> subprocess.CompletedProcess[str]:
        return raysweep(*args, "--address", cluster.address, env=cluster.env)

    uri = str(tmp_path / "results")
    secret = tmp_path / "job.env"
    secret.write_text("# for the study\nRAYSWEEP_TEST=one two\n")
    submit = ["submit", SMOKE, "--results", uri, "--env-file", str(secret)]
    first = call(*submit, "--set", "search.trials_per_cell=40")
    assert first.returncode == 0, first.stderr
    job = first.stdout.split()[1]
    assert job.startswith("raysweep-smoke-")

    one_line(call(*submit), job, "runs already")
    deadline = time.monotonic() + 90
    while not list((tmp_path / "results" / "trials").glob("[!.]*.parquet")):
        assert time.monotonic() < deadline, call("logs", job).stdout
        time.sleep(0.1)
    stopped = call("stop", job)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == f"stopped {job}\n"
    assert "had ended already" in call("stop", job).stdout
    assert call("logs", job).stdout.rstrip().endswith("run the same command again to continue")
    before = Results.open(uri).to_pandas()
    assert 1 <= len(before) < 160

    second = call(*submit, "--set", "search.trials_per_cell=2", "--wait")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "'raysweep report" in second.stdout
    rows = Results.open(uri).to_pandas()
    finished = rows[rows["status"] == "finished"].groupby("cell").size()
    assert len(finished) == 4
    assert finished.min() >= 2
    kept = rows.set_index("trial_key").loc[before["trial_key"]]
    assert kept["started_at"].tolist() == before["started_at"].tolist()

    listed = json.loads(call("status", "--json").stdout)
    assert [entry["status"] for entry in listed] == ["SUCCEEDED", "STOPPED"]
    assert {entry["results"] for entry in listed} == {uri}
    logs = call("logs", listed[0]["job"])
    assert logs.returncode == 0, logs.stderr
    assert "4 cells" in logs.stdout
    assert "\x1b" not in logs.stdout, "control characters in a log"
    for unknown in ("raysweep-nothing", "raysweep-401"):
        one_line(call("logs", unknown), f"no job {unknown}", job)


LOST_NODE = """
study: lost-node
model: {sequence_length: 32}
scales:
  - {name: one, d_model: 16, layers: 1, heads: 1}
  - {name: two, d_model: 24, layers: 1, heads: 1, resources: {workers: 2}}
horizons: [{tokens: 40e3}]
search:
  trials_per_cell: 1
  extend_edges: false
  learning_rate: {low: 1e-3, high: 1e-2}  # calm: a sum's order must not change the loss
  batch_sequences: {low: 4, high: 8}
recipe: {checkpoint_seconds: 1}
data: {max_megabytes: 2, validation_sequences: 64}
"""


def test_a_node_dies_under_a_submitted_study(cluster, tmp_path: Path) -> None:
    """Trials on one worker and on two, over three nodes; one that a trial shares is killed."""
    local = cluster.nodes
    local.add_worker()
    cluster.brake.press()
    space, uri = tmp_path / "space.yaml", tmp_path / "results"
    space.write_text(LOST_NODE)
    to = ["--address", cluster.address]
    sent = raysweep("submit", str(space), "--results", str(uri), *to, env=cluster.env)
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.split()[1]

    def state() -> tuple[str, str]:
        entries = json.loads(raysweep("status", "--json", *to, env=cluster.env).stdout)
        log = raysweep("logs", job, *to, env=cluster.env).stdout
        return next(e["status"] for e in entries if e["job"] == job), log

    deadline = time.monotonic() + 400
    at_work: list[Node] = []
    while not at_work or not list(uri.glob("checkpoints/*/checkpoint.pt")):
        assert time.monotonic() < deadline, state()
        at_work = [n for n in local.workers if in_trial(n.pids(), (TRAIN_WORKER,))]
        time.sleep(0.1)
    before = Results.open(uri).to_pandas()
    local.kill(at_work[0])
    cluster.brake.release()
    local.add_worker()
    while (now := state())[0] != "SUCCEEDED":
        assert now[0] == "RUNNING", now
        assert time.monotonic() < deadline, now
        time.sleep(1)
    rows = Results.open(uri).to_pandas().set_index("trial_key")
    assert rows.index.is_unique
    assert set(rows["status"]) == {"finished"}
    assert rows.groupby("world_size").size().to_dict() == {1: 1, 2: 1}
    kept = rows.loc[before["trial_key"]]
    assert kept["started_at"].tolist() == before["started_at"].tolist()
    assert not list(uri.glob("checkpoints/*"))
    last = rows[rows["world_size"] == 2].iloc[0]
    study, rate, batch = Study.load(space), last["learning_rate"], int(last["batch_tokens"])
    alone = train_one(study, last["cell"], rate, batch, seed=int(last["seed"]))
    assert last["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_wrong_token_and_wrong_address_are_one_line(cluster, tmp_path: Path) -> None:
    submit = ["submit", SMOKE, "--results", str(tmp_path / "r"), "--address"]
    wrong = cluster.env | {"RAY_AUTH_TOKEN": "0" * 32}
    one_line(raysweep(*submit, cluster.address, env=wrong), "token", "RAY_AUTH_TOKEN_PATH")
    bare = {k: v for k, v in cluster.env.items() if not k.startswith("RAY_")}
    bare["HOME"] = str(tmp_path)  # without a token file either
    one_line(raysweep(*submit, cluster.address, env=bare), "token")
    one_line(raysweep(*submit, "http://127.0.0.1:1", env=cluster.env), "http://127.0.0.1:1")
    nowhere = ["submit", SMOKE, "--results", "nope://x", "--address", cluster.address]
    one_line(raysweep(*nowhere, env=cluster.env), "nope://x: no filesystem")
    assert not (tmp_path / "r").exists()


def test_local_results_of_a_head_elsewhere_are_refused(cluster, tmp_path: Path) -> None:
    elsewhere = (
        "import socket; socket.gethostname = lambda: 'laptop'; "
        "from raysweep.cli import main; main()"
    )
    uri = str(tmp_path / "r")
    submit = ["submit", SMOKE, "--results", uri, "--address", cluster.address]
    done = subprocess.run(
        [sys.executable, "-c", elsewhere, *submit],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=cluster.env,
        timeout=200,
        check=False,
    )
    one_line(done, uri, "would land on the nodes", "--yes")
