"""Training by a user's own function or command, here, without Ray: every way that it can end."""

import contextlib
import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.study import Study, TrialSpec
from raysweep.training.command import train_by_command
from raysweep.training.outcome import Silent, TrialOutcome, WorkerOutOfMemory
from raysweep.training.own import train_by_function
from raysweep.training.trial_folder import SAVED, TrialFolder

FUNCTIONS = """
    import json, math, time

    def plain(run):
        return 2.0 + math.log10(run.learning_rate) ** 2 / 10

    def everything(run):
        for step in range(1, run.steps + 1):
            run.report(step * run.batch_tokens, 5 - step / run.steps, learning_rate=0.1)
        return {"loss": 3.0, "loss_se": 0.01, "tokens": run.tokens, "grad_skips": 2, "note": "ok"}

    def nothing(run): pass
    def words(run): return "low"
    def zero(run): return 0.0
    def no_loss(run): return {"lose": 3.0}
    def nan(run): return float("nan")
    def raises(run): raise KeyError("bad config\\nsecond line")
    def exits(run): raise SystemExit(3)
    def hungry(run): raise MemoryError("no room")
    def short(run): return {"loss": 3.0, "tokens": run.tokens / 2}

    def rises(run):
        for step in range(1, run.steps + 1):
            try:
                run.report(step * run.batch_tokens, 2.0 + step)
            except Exception:
                pass
        return 1.0

    def breaks(run):
        run.report(run.batch_tokens, 3.0)
        run.report(2 * run.batch_tokens, float("nan"))
        return 1.0

    def resumes(run):
        saved = run.folder / "step"
        step = int(saved.read_text()) if saved.exists() else 0
        while step < run.steps:
            step += 1
            saved.write_text(str(step))
            run.report(step * run.batch_tokens, 4.0)
            if run.should_stop():
                return None
        return {"loss": 3.0, "first": step}

    def keeps(run):
        step = run.folder / "deep" / ".step"
        at = int(step.read_text()) if step.exists() else 0
        found = sorted(path.name for path in run.folder.rglob("*"))
        assert found == ([".step", "deep", "empty"] if at else [])
        step.parent.mkdir(exist_ok=True)
        (run.folder / "empty").touch()
        step.write_text(str(at + 1))
        run.save()
        step.write_text("lost")
        if at < 2:
            raise RuntimeError("a machine is gone")
        step.write_text("last")
        return {"loss": 3.0, "first": at}

    def sleeps(run): time.sleep(60)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's module."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "my_lab_test.py").write_text(textwrap.dedent(FUNCTIONS))
    (folder / "my_lab_broken.py").write_text("import no_such_module_here\n")
    return folder


def spec(training: dict[str, Any], folder: Path, **more: Any) -> TrialSpec:
    study = Study.from_dict(
        {
            "study": "own",
            "training": training,
            "model": {"sequence_length": 16},
            "scales": [{"name": "s", "settings": {"n": 4}, "params": 1e5, "flops_per_token": 7e5}],
            "horizons": [{"tokens": 6400}],
            **more,
        },
        folder,
    )
    return study.trial(study.cells[0], "own", 0.01, 4, 0)


def by_function(
    name: str, code: Path, tmp_path: Path, reporter: Any = None, **training: Any
) -> TrialOutcome:
    return train_by_function(
        spec({"function": name, **training}, code),
        code,
        Storage.at(tmp_path),
        reporter or Silent(),
        on_timeout=lambda reason: None,
    )


def test_a_loss_alone_makes_an_outcome(code: Path, tmp_path: Path) -> None:
    outcome = by_function("my_lab_test:plain", code, tmp_path)
    assert outcome.status == "finished"
    assert outcome.loss == pytest.approx(2.4)
    assert outcome.tokens_seen == 6400
    assert outcome.step == 100
    assert outcome.seconds_train > 0
    assert outcome.peak_memory_bytes > 1e6


def test_columns_and_metrics_and_a_curve(code: Path, tmp_path: Path) -> None:
    outcome = by_function("my_lab_test:everything", code, tmp_path)
    assert (outcome.loss, outcome.loss_se, outcome.train_loss) == (3.0, 0.01, 4.0)
    assert outcome.metrics == {"grad_skips": 2.0, "note": "ok"}
    assert outcome.curve["tokens"][:2] == [64.0, 128.0]
    assert outcome.curve["step"][-1] == 100


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_lab_test:nothing", "my_lab_test:nothing returned None: return the final loss"),
        ("my_lab_test:words", "returned loss 'low': it must be a number"),
        ("my_lab_test:zero", "my_lab_test:zero returned loss 0: it must be positive"),
        ("my_lab_test:no_loss", "returned no 'loss'"),
        ("my_lab_test:raises", r"raised KeyError: 'bad config.*\(my_lab_test.py:\d+\)"),
        ("my_lab_test:exits", "raised SystemExit: 3"),
        ("my_lab_test:plane", "has no plane: did you mean my_lab_test:plain"),
        ("my_lab_missing:train", "cannot be imported.*it must lie in"),
        ("my_lab_broken:train", r"cannot be imported.*no_such_module_here.*my_lab_broken.py:1"),
        ("my_lab_test:FUNCTIONS", "has no FUNCTIONS"),
    ],
)
def test_what_is_wrong_is_one_line(name: str, says: str, code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as error:
        by_function(name, code, tmp_path)
    assert "\n" not in str(error.value)


def test_out_of_memory_is_told_apart_and_tracebacks_are_kept(code: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerOutOfMemory, match="no room"):
        by_function("my_lab_test:hungry", code, tmp_path)
    (log,) = (tmp_path / "logs").iterdir()
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "non-finite final loss"),
        ("breaks", "non-finite loss after 128 tokens"),
        ("rises", "far above the first"),
    ],
)
def test_divergence(name: str, reason: str, code: Path, tmp_path: Path) -> None:
    """Also one that hides behind the function's own handlers."""
    outcome = by_function(f"my_lab_test:{name}", code, tmp_path)
    assert outcome.status == "diverged"
    assert reason in str(outcome.reason)
    assert outcome.loss is None


def test_half_a_horizon_is_not_finished(code: Path, tmp_path: Path) -> None:
    outcome = by_function("my_lab_test:short", code, tmp_path)
    assert (outcome.status, outcome.loss) == ("stopped", None)
    assert outcome.tokens_seen == 3200


def test_a_stopped_run_goes_on_from_its_folder(code: Path, tmp_path: Path) -> None:
    class Stops(Silent):
        asked = 0

        def should_stop(self) -> bool:
            self.asked += 1
            return self.asked == 7

    assert by_function("my_lab_test:resumes", code, tmp_path, Stops()).status == "stopped"
    again = by_function("my_lab_test:resumes", code, tmp_path)
    assert again.status == "finished"
    assert again.curve["step"][0] == 8


def test_a_folder_in_a_bucket_is_what_was_saved_last(
    code: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one machine, another, and the first again, which still has its own, older copy."""
    storage = Storage.at(bucket)
    at = spec({"function": "my_lab_test:keeps", "keep_folders": True}, code)

    def start(machine: str) -> TrialOutcome:
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / machine))
        return train_by_function(at, code, storage, Silent(), on_timeout=lambda reason: None)

    for machine in ("one", "other"):
        with pytest.raises(UserError, match="a machine is gone"):
            start(machine)
    # A machine that is gone as it saves leaves half a copy, which counts for nothing.
    storage.write(b"9", "kept", at.key, "half", "deep", ".step")
    assert start("one").metrics == {"first": 2}
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "reader"))
    kept = TrialFolder(storage, at.key, kept=True)
    assert (kept.open() / "deep" / ".step").read_text() == "last"
    assert len(storage.folders("kept", at.key)) == 1
    kept.forget()
    assert not storage.folders("kept")
    assert not kept.path.exists()


def test_what_a_reporter_raises_passes(code: Path, tmp_path: Path) -> None:
    """So Tune ends a trial early."""

    class Ends(Silent):
        def report(self, step: int, tokens: int, loss: float) -> None:
            raise SystemExit(0)

    with pytest.raises(SystemExit) as ended:
        by_function("my_lab_test:everything", code, tmp_path, Ends())
    assert ended.value.code == 0


def test_the_alarm_rings_from_another_thread(code: Path, tmp_path: Path) -> None:
    rung = threading.Event()
    reasons: list[str] = []

    def ring(reason: str) -> None:
        reasons.append(reason)
        rung.set()

    at = spec({"function": "my_lab_test:sleeps", "timeout": 0.1}, code)
    where = Storage.at(tmp_path)

    def train() -> None:
        with contextlib.suppress(UserError):  # it wakes up after the test, and returns no loss
            train_by_function(at, code, where, Silent(), on_timeout=ring)

    threading.Thread(target=train, daemon=True).start()
    assert rung.wait(10)
    assert reasons == ["took longer than training.timeout (0.1 s)"]


# --- commands -----------------------------------------------------------------------------------

SCRIPT = """
    import json, os, pathlib, signal, subprocess, sys, time

    what, lr, folder = sys.argv[1], float(sys.argv[2]), pathlib.Path(sys.argv[3])
    out = folder / "metrics.json"
    if what == "fine":
        with open(folder / "progress.jsonl", "a") as log:
            for k in range(1, 11):
                log.write(json.dumps({"at": {"tokens": 640 * k}, "train": 5 - k / 10}) + "\\n")
        out.write_text(json.dumps({"eval": {"loss": 2 + lr}, "accuracy": 0.5}))
    elif what == "nan":
        out.write_text('{"eval": {"loss": NaN}}')
    elif what == "other":
        out.write_text('{"loss": 3}')
    elif what == "text":
        out.write_text("loss: 3")
    elif what == "fails":
        print("half way")
        raise ValueError("no such optimizer")
    elif what == "memory":
        raise MemoryError("cannot allocate")
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "diverges":
        (folder / "progress.jsonl").write_text('{"at": {"tokens": 64}, "train": NaN}\\n')
        time.sleep(60)
    elif what == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                                 start_new_session=True)
        (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    elif what == "stops":
        def leave(*_):
            (folder / "left").write_text("here")
            sys.exit(1)
        signal.signal(signal.SIGTERM, leave)
        (folder / "pids").write_text(str(os.getpid()))
        time.sleep(60)
    elif what == "saves":
        steps = folder / "steps"
        first = step = int(steps.read_text()) if steps.exists() else 0
        while step < (first + 10 if first else 1_000_000):
            step += 1
            steps.with_suffix(".new").write_text(str(step))
            steps.with_suffix(".new").replace(steps)
            time.sleep(0.01)
        out.write_text(json.dumps({"eval": {"loss": 3}, "first": first}))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    return folder


def command(what: str, **more: Any) -> dict[str, Any]:
    return {
        "command": [sys.executable, "train.py", what, "{learning_rate}", "{folder}"],
        "result": {"file": "{folder}/metrics.json", "loss": "eval.loss"},
        "progress": {"file": "{folder}/progress.jsonl", "tokens": "at.tokens", "loss": "train"},
        **more,
    }


def by_command(
    training: dict[str, Any], script: Path, tmp_path: Path, reporter: Any = None
) -> TrialOutcome:
    return train_by_command(
        spec(training, script), script, Storage.at(tmp_path), reporter or Silent()
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends as it is read
        return False
    return state != "Z"


def test_a_command_makes_an_outcome(script: Path, tmp_path: Path) -> None:
    outcome = by_command(command("fine"), script, tmp_path)
    assert (outcome.status, outcome.loss) == ("finished", 2.01)
    assert outcome.metrics == {"accuracy": 0.5}
    assert outcome.curve["tokens"] == [640.0 * k for k in range(1, 11)]
    assert outcome.train_loss == 4.0
    assert outcome.peak_memory_bytes > 1e6


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("other", r"metrics.json has no 'eval.loss' \(it has loss\)"),
        ("text", "is no JSON mapping"),
        ("writes nothing", "the command ended, but it wrote no result .training.result.file: "),
        ("fails", "failed with exit code 1: ValueError: no such optimizer"),
        ("killed", "was killed by SIGKILL, perhaps for want of memory"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(
    what: str, says: str, script: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as error:
        by_command(command(what), script, tmp_path)
    assert "\n" not in str(error.value)


def test_a_command_that_is_not_there(script: Path, tmp_path: Path) -> None:
    training = command("fine") | {"command": ["no-such-program", "{seed}"]}
    with pytest.raises(UserError, match=r"no-such-program cannot be started: .*No such file"):
        by_command(training, script, tmp_path)


def test_a_command_out_of_memory_or_diverged(script: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerOutOfMemory, match="cannot allocate"):
        by_command(command("memory"), script, tmp_path)
    assert by_command(command("nan"), script, tmp_path).status == "diverged"
    begun = time.monotonic()
    assert by_command(command("diverges"), script, tmp_path).status == "diverged"
    assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_a_timeout_kills_all_that_a_command_started(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysweep.training.command.GRACE_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"took longer than training.timeout \(5 s\)"):
        by_command(command("hangs", timeout=5), script, tmp_path)
    (pids,) = tmp_path.rglob("pids")
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_a_command_that_is_stopped_leaves_its_folder(script: Path, tmp_path: Path) -> None:
    class Stops(Silent):
        def should_stop(self) -> bool:
            return bool(list(tmp_path.rglob("pids")))

    outcome = by_command(command("stops"), script, tmp_path, Stops())
    assert outcome.status == "stopped"
    (left,) = tmp_path.rglob("left")
    assert left.read_text() == "here"


def test_a_command_goes_on_elsewhere_from_what_was_saved_as_it_ran(
    script: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It replaces its files meanwhile."""
    monkeypatch.setattr("raysweep.training.command.SAVE_SECONDS", 0.2)
    monkeypatch.setattr("raysweep.training.command.LOOK_SECONDS", 0.05)
    storage, at = Storage.at(bucket), spec(command("saves"), script)

    class Dies(Silent):
        def should_stop(self) -> bool:
            if b'"steps"' in (storage.read("checkpoints", at.key, SAVED) or b""):
                raise OSError("the machine is gone")
            return False

    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "one"))
    with pytest.raises(OSError, match="is gone"):
        train_by_command(at, script, storage, Dies())
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "other"))
    outcome = train_by_command(at, script, storage, Silent())
    assert outcome.status == "finished"
    assert outcome.metrics["first"] > 0
    assert storage.read("logs", f"{at.key}.log") == b""


@pytest.mark.slow
def test_nothing_outlives_whoever_started_a_command(script: Path, tmp_path: Path) -> None:
    """The worker is killed with SIGKILL; its command has a child in a session of its own."""
    at = json.dumps(command("hangs"))
    code = f"""
import json, pathlib
from tests.training.test_own import by_command
by_command(json.loads({at!r}), pathlib.Path({str(script)!r}), pathlib.Path({str(tmp_path)!r}))
"""
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.rglob("pids"))) or not found[0].read_text():
        assert time.monotonic() < deadline
        assert worker.poll() is None
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    pids = [int(pid) for pid in found[0].read_text().split()]
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_placeholders_are_checked_before_anything_runs(script: Path) -> None:
    training = command("fine") | {"command": ["x", "{lerning_rate}"]}
    with pytest.raises(UserError, match=r"\{lerning_rate\} stands for nothing: did you mean"):
        spec(training, script)
    filled = spec(command("fine") | {"command": ["x", "{n}", '{{"lr": {learning_rate}}}']}, script)
    assert filled.values()["n"] == 4
    assert not math.isnan(filled.learning_rate)
