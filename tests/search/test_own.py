"""A user's own training on a real local Ray: rows of every kind of end, and processes killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from raysweep.results import Results
from raysweep.search.run import run
from raysweep.study import Study

pytestmark = pytest.mark.ray

CODE = """
    import json, math, os, pathlib, time

    def loss(lr, batch):
        return 2.5 + 0.05 * math.log(lr / 0.01) ** 2 + 0.02 * math.log(batch / 256) ** 2

    def train(run):
        what = run.settings["what"]
        if what == "raises":
            raise ValueError("no such optimizer")
        if what == "nothing":
            return None
        if what == "hangs":
            time.sleep(600)
        if what == "nan":
            return float("nan")
        run.report(run.tokens / 2, 4.0)
        found = loss(run.learning_rate, run.batch_tokens)
        return {"loss": found, "decay": run.settings["weight_decay"]}

    def together(run):
        import torch
        from torch import distributed, nn
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        total = torch.tensor([float(run.rank + 1)])
        distributed.all_reduce(total)
        assert run.world_size == 2 and total.item() == 3.0
        assert not run.should_stop()
        what = run.settings["what"]
        once = pathlib.Path(__file__).with_name(what)
        first = not once.exists()
        distributed.barrier()
        once.touch()
        run.report(run.tokens / 2, float("nan") if what == "nan" and first else 4.0)
        if what == "raises" and first and run.rank == 1:
            raise ValueError("only here")
        if what == "both" and first:
            raise ValueError("everywhere")
        if what == "worker_dies" and first and run.rank == 1:
            os._exit(1)
        model(torch.ones(2, 4)).sum().backward()
        if what == "ends":
            distributed.destroy_process_group()
        return {"loss": loss(run.learning_rate, run.batch_tokens), "pid": os.getpid()}

    def keep(kept, step):
        part = kept.with_name("part")
        part.write_text(str(step))
        part.replace(kept)  # whole, whenever it is killed

    def slow(run):
        # 1 s, in steps, each kept; every start is noted
        with open(run.folder.parent.parent / "starts", "a") as starts:
            starts.write(f"{os.getpid()} {run.folder.name}\\n")
        kept = run.folder / "step"
        step = int(kept.read_text()) if kept.exists() else 0
        first = step
        while step < 10:
            time.sleep(0.1)
            step += 1
            keep(kept, step)
            run.report(run.tokens * step / 10, 4.0)
        return {"loss": loss(run.learning_rate, run.batch_tokens), "first": first}

    if __name__ == "__main__":
        import sys
        folder, lr, batch = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
        with open(folder.parent.parent / "starts", "a") as starts:
            starts.write(f"{os.getpid()} {folder.name}\\n")
        kept = folder / "step"
        first = step = int(kept.read_text()) if kept.exists() else 0
        while step < 10:
            time.sleep(0.1)
            step += 1
            keep(kept, step)
        (folder / "out.json").write_text(json.dumps({"loss": loss(lr, batch), "first": first}))
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_search_test.py").write_text(textwrap.dedent(CODE))
    return folder


def space(training: dict[str, Any], *whats: str, **more: Any) -> dict[str, Any]:
    scale = {"params": 1e5, "flops_per_token": 7e5}
    return {
        "study": "own",
        "training": training,
        "model": {"sequence_length": 16},
        "scales": [
            scale | {"name": what, "settings": {"what": what, "n": k}}
            for k, what in enumerate(whats)
        ],
        "horizons": [{"tokens": 64_000}],
        "search": {"trials_per_cell": 3, "extend_edges": False},
        **more,
    }


def rows(results: Path) -> pd.DataFrame:
    return Results.open(results).to_pandas()


def test_every_end_is_a_row_and_the_study_goes_on(code: Path, tmp_path: Path) -> None:
    training = {"function": "own_search_test:train", "timeout": 2, "settings": {"optimizer": "x"}}
    given = space(training, "good", "raises", "nothing", "hangs", "nan")
    given["search"]["also"] = {"weight_decay": {"low": 0.01, "high": 1.0}}
    study = Study.from_dict(given, code)
    run(study, results_uri=str(tmp_path / "results"))
    frame = rows(tmp_path / "results")
    assert frame["trial_key"].is_unique
    by_scale = {str(scale): part for scale, part in frame.groupby("scale")}
    good = by_scale["good"]
    assert set(good["status"]) == {"finished"}
    assert len(good) == 3
    assert good["source"].tolist() == ["own"] * 3
    recipes = [json.loads(text) for text in good["recipe"]]
    assert {recipe["optimizer"] for recipe in recipes} == {"x"}
    decays = [recipe["weight_decay"] for recipe in recipes]
    assert decays == [json.loads(text)["decay"] for text in good["metrics"]]
    assert len(set(decays)) == 3
    assert (good["params_active_non_embedding"] == 1e5).all()
    assert good["params_total"].isna().all()
    reasons = {
        "raises": "raised ValueError: no such optimizer (own_search_test.py:",
        "nothing": "returned None",
        "hangs": "took longer than training.timeout (2 s)",
    }
    for scale, reason in reasons.items():
        assert set(by_scale[scale]["status"]) == {"crashed"}, scale
        assert all(reason in text for text in by_scale[scale]["reason"]), by_scale[scale]["reason"]
        assert len(by_scale[scale]) in (3, 4)  # two may run at once
    assert set(by_scale["nan"]["status"]) == {"diverged"}
    curves = Results.open(tmp_path / "results").curves(good["trial_key"])
    assert curves["tokens"].tolist() == [32_000.0] * 3
    assert not list((tmp_path / "results/checkpoints").glob("*/*"))


def test_several_workers_have_a_process_group(
    code: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trials that fail or are ended on one worker or on all leave the group warm. One that kills a
    worker is begun again in a new one, and the study says so."""
    training = {"function": "own_search_test:together"}
    whats = ("both", "ends", "good", "nan", "raises", "worker_dies")
    given = space(training, *whats, resources={"workers": 2})
    given["search"]["trials_per_cell"] = 1
    run(Study.from_dict(given, code), results_uri=str(tmp_path / "results"))
    frame = rows(tmp_path / "results").sort_values("started_at")
    found = {str(scale): part["status"].tolist() for scale, part in frame.groupby("scale")}
    assert found == {
        "nan": ["diverged", "finished"],
        "raises": ["crashed", "finished"],
        "both": ["crashed", "finished"],
        "ends": ["finished"],
        "good": ["finished"],
        "worker_dies": ["finished"],
    }
    finished = frame[frame["status"] == "finished"]
    assert (finished["world_size"] == 2).all()
    crashed = frame[frame["status"] == "crashed"].set_index("scale")["reason"]
    for what, says in (("raises", "only here"), ("both", "everywhere")):
        assert f"ValueError: {says} (own_search_test.py:" in crashed[what]
    pids = {row["scale"]: json.loads(row["metrics"])["pid"] for _, row in finished.iterrows()}
    said = [text for text in caplog.messages if "its workers begin anew" in text]
    assert len({pids[what] for what in whats[:-1]}) == 1, said
    assert pids["worker_dies"] != pids["good"]
    (why,) = said
    assert why.startswith("cell dense-worker_dies-64ktok: ")


TRAININGS = {
    "function": {"function": "own_search_test:slow"},
    "command": {
        "command": [
            *(sys.executable, "own_search_test.py", "{folder}"),
            *("{learning_rate}", "{batch_tokens}"),
        ],
        "result": {"file": "{folder}/out.json"},
    },
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_killed_worker_and_killed_driver_lose_and_repeat_nothing(
    kind: str, code: Path, tmp_path: Path
) -> None:
    """A worker, then the driver, are killed with SIGKILL while trials run; then it is run again."""
    path = code / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(space(TRAININGS[kind], "good", "best")))
    results = tmp_path / "results"
    words = [sys.executable, "-m", "raysweep", "run", str(path), "--results", str(results)]
    words += ["--report", str(tmp_path / "report"), "--no-live"]
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(words, stdout=log, stderr=log)

        def until(count: int, what: str) -> list[str]:
            deadline = time.monotonic() + 200
            while True:
                found = (
                    list((results / "trials").glob("[!.]*.parquet"))
                    if what == "rows"
                    else _lines(results / "starts")
                )
                if len(found) >= count:
                    return [str(f) for f in found]
                assert driver.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

        until(1, "rows")
        starts = until(len(_lines(results / "starts")) + 1, "starts")
        time.sleep(0.3)
        pid, key = starts[-1].split()
        worker = int(pid) if kind == "function" else _worker_of(int(pid))
        os.kill(worker, signal.SIGKILL)
        until(3, "rows")
        until(len(_lines(results / "starts")) + 1, "starts")
        time.sleep(0.3)
        driver.kill()
        driver.wait()
    time.sleep(2)
    before = rows(results)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    frame = rows(results)
    assert frame["trial_key"].is_unique
    assert set(frame["status"]) == {"finished"}, frame["reason"].tolist()
    assert frame.groupby("cell").size().tolist() == [3, 3]
    assert set(before["trial_key"]) <= set(frame["trial_key"])
    # The trial of the killed worker went on from what it had left in its folder.
    starts = [line.split()[1] for line in _lines(results / "starts")]
    assert starts.count(key) in (2, 3), "both kills may hit it"
    killed = frame[frame["trial_key"] == key]
    assert killed["metrics"].str.contains('"first": [1-9]').all()
    # A finished trial was started once, but for those that were running at a kill.
    assert len(starts) <= 6 + 1 + 2


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _worker_of(pid: int) -> int:
    """The Ray worker that a command's process was started by, through its supervisor."""
    supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1])
