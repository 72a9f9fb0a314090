"""A study submitted to a real cluster of two nodes: refused twice, stopped, continued, done."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysweep.results import Results

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
SMOKE = str(REPO / "search_spaces/smoke.yaml")


def raysweep(
    *args: str, env: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raysweep.cli", *args],
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
    before = Results.open(uri).frame()
    assert 1 <= len(before) < 160

    second = call(*submit, "--set", "search.trials_per_cell=2", "--wait")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "'raysweep report" in second.stdout
    rows = Results.open(uri).frame()
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
