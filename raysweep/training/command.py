"""A trial by a user's own command: started in the trial's resources, watched, ended, read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysweep.errors import StorageError, UserError
from raysweep.results.filesystem import Storage
from raysweep.study.own import CommandProgress, CommandResult, fill_in
from raysweep.study.spec import TrialSpec
from raysweep.training import machine, supervisor
from raysweep.training.outcome import Reporter, TrialOutcome, WorkerOutOfMemory
from raysweep.training.own import (
    LOGS,
    Cost,
    Progress,
    TrialEnded,
    ended_early,
    judge,
    read_answer,
    timeout_reason,
)
from raysweep.training.trial_folder import TrialFolder

GRACE_SECONDS = 15.0
"""What a command gets to end after SIGTERM; then it is killed."""
LOOK_SECONDS = 0.5
"""Between two looks at a command that runs; the first ones come faster."""
SAVE_SECONDS = 300.0
"""With results in an object store, the trial's folder is sent there this often."""
MAX_REASON = 300
NOTHING = "it said nothing"
NOT_STARTED = 127
"""Exit code of a command that is not there."""
_PREFIX = re.compile(r"^(\[[^\]]*\]:?\s*)+")
"""What torchrun puts before a worker's lines: [rank0]: and the like."""
_NO_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "out of memory", "MemoryError")


def train_by_command(
    spec: TrialSpec, folder: str | Path, storage: Storage, reporter: Reporter
) -> TrialOutcome:
    """Run the study's command for a trial, in `folder` (that of the search-space file).

    What it prints goes to `logs/KEY.log` of the results. Asked to stop, it gets SIGTERM and
    `GRACE_SECONDS`; what it left in the trial's folder is there when it is started again.

    Raises:
        UserError: it cannot be started, exits with an error, takes longer than the study's
            timeout, or leaves no loss.
        WorkerOutOfMemory: its last words say that memory ran out.
    """
    training, workers = spec.training, spec.cell.resources.workers
    assert training is not None
    assert training.command is not None
    assert training.result is not None
    own = TrialFolder(storage, spec.key, training.keep_folders)
    place = own.open()
    values = spec.values() | {"folder": str(place)}
    words = fill_in(training.command, values)
    result = _path(fill_in([training.result.file], values)[0], folder)
    result.unlink(missing_ok=True)  # of an earlier start
    progress = Progress(spec, reporter, own)
    tail = None
    if training.progress is not None:
        tail = _Tail(_path(fill_in([training.progress.file], values)[0], folder), training.progress)
    log = Path(storage.path(LOGS, f"{spec.key}.log")) if storage.is_local else place / "log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(log, "wb") as output, _started(words, folder, spec, output) as process:
        ending = _watch(process, training.timeout, reporter, progress, tail, own)
    code = process.wait()
    seconds = time.perf_counter() - started
    cost = Cost(seconds, machine.peak_memory_of_children(), machine.cpu_name(), workers)
    if not storage.is_local:
        with contextlib.suppress(StorageError):  # what was trained is worth more
            storage.write(log.read_bytes(), LOGS, f"{spec.key}.log")
    if ending == "stop":
        own.save()
        return ended_early(spec, progress, "stopped", None, cost)
    if progress.diverged:
        return ended_early(spec, progress, "diverged", progress.diverged, cost)
    if ending == "timeout":
        assert training.timeout is not None
        raise UserError(timeout_reason(training.timeout))
    if code:
        said = last_words(log)
        if any(text in said for text in _NO_MEMORY):
            raise WorkerOutOfMemory(said)
        silent = code == NOT_STARTED or said == NOTHING
        more = "" if silent else f" (all it printed: {LOGS}/{spec.key}.log)"
        raise UserError(_failure(words[0], code, said) + more)
    if tail is not None:
        _tell(tail, progress)  # what came last; a divergence there shows in the loss as well
    found = _read_result(result, training.result)
    if training.keep_folders:
        own.save()
    return judge(spec, found, progress, cost)


def _path(text: str, folder: str | Path) -> Path:
    """A path that is taken from the search-space file's folder."""
    return Path(folder) / Path(text).expanduser()


@contextlib.contextmanager
def _started(words: list[str], folder: str | Path, spec: TrialSpec, output: Any) -> Any:
    """The command under its supervisor; nothing of it is left when the block ends."""
    here = os.path.dirname(sys.executable)  # python and torchrun are those of this environment
    environment = {
        **os.environ,
        "PATH": f"{here}:{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": str(spec.cell.resources.threads),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__, *words],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()  # the supervisor then kills what is left
        process.wait()


def _watch(
    process: subprocess.Popen[bytes],
    timeout: float | None,
    reporter: Reporter,
    progress: Progress,
    tail: _Tail | None,
    own: TrialFolder,
) -> str | None:
    """Follow a command to its end; "stop" or "timeout" where it was ended for that."""
    begun, pause, saved = time.monotonic(), 0.02, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
            return None
        pause = min(LOOK_SECONDS, 1.5 * pause)
        if tail is not None and not _tell(tail, progress):
            return None  # diverged: the block's end kills it
        if reporter.should_stop():
            _terminate(process)
            return "stop"
        now = time.monotonic()
        if timeout and now - begun > timeout:
            _terminate(process)
            return "timeout"
        if now - saved > SAVE_SECONDS:
            saved = now
            with contextlib.suppress(UserError):  # the storage fails: the next one may do
                own.save()


def _terminate(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)


def _tell(tail: _Tail, progress: Progress) -> bool:
    """Report what is new; False where the run has diverged."""
    try:
        for tokens, loss in tail.read():
            progress.report(tokens, loss, None, None)
    except TrialEnded:
        return False
    return True


class _Tail:
    """New lines of a file of JSON lines, as they come."""

    def __init__(self, path: Path, keys: CommandProgress) -> None:
        self._path, self._keys, self._at = path, keys, 0

    def read(self) -> list[tuple[float, float]]:
        """(tokens, loss) of each whole line since the last call; others are passed over."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                values = json.loads(line)
                if isinstance(values, dict):
                    tokens, loss = (_at(values, k) for k in (self._keys.tokens, self._keys.loss))
                    if tokens is not None and loss is not None:
                        found.append((float(tokens), float(loss)))
        return found


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    """The value at a key, or at the keys between its dots; None where there is none."""
    if dotted in values:
        return values[dotted]
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _read_result(path: Path, keys: CommandResult) -> dict[str, Any]:
    """What a command left: its loss, and the numbers and texts beside it. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it wrote no result" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"the command ended, but {reason} (training.result.file: {path})") from None
    values: Any = None
    for part in (text, text.splitlines()[-1] if text else ""):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(part)
            break
    if not isinstance(values, dict):
        raise UserError(f"the result {path.name} is no JSON mapping: it must hold {keys.loss!r}")
    loss = _at(values, keys.loss)
    if loss is None:
        known = ", ".join(map(str, list(values)[:8])) or "nothing"
        raise UserError(f"the result {path.name} has no {keys.loss!r} (it has {known})")
    rest = {k: v for k, v in values.items() if isinstance(v, int | float | str) and k != keys.loss}
    if isinstance(loss, str) and loss.lower() in ("nan", "inf", "-inf"):
        loss = math.nan  # as some write what JSON has no number for
    return read_answer({**rest, "loss": loss}, f"the result {path.name} has")


def last_words(log: Path) -> str:
    """The line of a log that says best why it ended: the last that names an error, or the last."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if any(c.isalnum() for c in line)]
    lines = [_PREFIX.sub("", line) for line in lines]
    named = [line for line in lines if _is_error(line)]
    # What starts workers (torchrun) names its own error after theirs.
    own = [line for line in named if "ChildFailedError" not in line]
    died = [line for line in lines if line.startswith("traceback : Signal")]
    return (own or died or named or lines or [NOTHING])[-1][:MAX_REASON]


def _is_error(line: str) -> bool:
    name, colon, _ = line.partition(":")
    return bool(colon) and name.endswith(("Error", "Exception", "Exit")) and " " not in name


def _failure(name: str, code: int, said: str) -> str:
    if code == NOT_STARTED:
        return f"the command {name} cannot be started: {said}"
    if code > 128:
        with contextlib.suppress(ValueError):
            ended = signal.Signals(code - 128).name
            more = ", perhaps for want of memory" if ended == "SIGKILL" else ""
            return f"the command was killed by {ended}{more}: {said}"
    return f"the command failed with exit code {code}: {said}"
