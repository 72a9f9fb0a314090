"""Studies as Ray Jobs: submit, list, follow, stop. Every failure is one line."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raysweep.cluster.package import collect, stage
from raysweep.errors import UserError
from raysweep.results.filesystem import local_folder
from raysweep.study import Study

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PREFIX = "raysweep-"
STUDY, RESULTS = "raysweep_study", "raysweep_results"
"""Keys of a job's metadata."""

CONNECT_SECONDS = 10.0
DRIVER_SECONDS = 40
"""What a driver gets to wind down: its trials finish or leave a checkpoint within 30 s."""
STOP_SECONDS = 60.0
RECONNECTS = 20
"""Times that following a job takes a lost connection up again, a few seconds apart."""
RECONNECT_SECONDS = 3.0
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class Jobs:
    """The jobs of one cluster. Opening it raises UserError where the cluster does not answer."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _reach(self.address)
        self._client = _connect(self.address)

    def submit(
        self,
        space: Path,
        results: str,
        *,
        overrides: Sequence[str] = (),
        env_file: Path | None = None,
        allow_local: bool = False,
    ) -> str:
        """Send a study to the cluster and start it; returns the job's id.

        The driver runs on the head, as it would here with `--address auto`. Local results, which
        each node would write for itself, need `allow_local` unless all nodes are this machine.
        Raises UserError where the study runs already, or something given cannot be used.
        """
        study = Study.load(space, overrides)
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(DRIVER_SECONDS)}
        variables |= read_env_file(env_file) if env_file else {}
        results = self._results(results, allow_local)
        for job in self.all():
            if not finished(job) and job.metadata and job.metadata.get(STUDY) == study.name:
                raise UserError(
                    f"study {study.name} runs already as {job.submission_id}: follow it with "
                    f"'raysweep logs {job.submission_id} -f', or end it with 'raysweep stop'"
                )
        files, place = collect(space, study, leave_out=(env_file,) if env_file else ())
        command = ["python", "-m", "raysweep", "run", place]
        command += ["--results", results, "--address", "auto"]
        command += [word for override in overrides for word in ("--set", override)]
        with tempfile.TemporaryDirectory(prefix="raysweep-") as folder:
            stage(files, Path(folder))
            with self._errors():
                # No CPUs asked for: Ray then keeps the driver on the head, and off spot nodes.
                return self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=f"{PREFIX}{study.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
                    runtime_env={"working_dir": folder, "env_vars": variables},
                    metadata={STUDY: study.name, RESULTS: results},
                )

    def all(self) -> list[JobDetails]:
        """Jobs that raysweep submitted, newest first."""
        with self._errors():
            jobs = self._client.list_jobs()
        own = [j for j in jobs if (j.submission_id or "").startswith(PREFIX)]
        return sorted(own, key=lambda j: j.start_time or 0, reverse=True)

    def get(self, job: str) -> JobDetails:
        """One job; UserError with the known ones if there is none of that id."""
        try:
            return self._client.get_job_info(job)
        except RuntimeError as error:
            if _http_status(error) != 404:
                raise self._user_error(error) from error
            known = ", ".join(j.submission_id or "" for j in self.all()[:3]) or "none"
            raise UserError(f"no job {job} at {self.address}; latest: {known}") from None
        except Exception as error:
            raise self._user_error(error) from error

    def logs(self, job: str) -> str:
        """What a job has printed so far."""
        self.get(job)
        with self._errors():
            return self._client.get_job_logs(job)

    def follow(self, job: str, show: Callable[[str], object]) -> JobDetails:
        """Show what a job prints until it ends, through lost connections; returns how it ended."""
        self.get(job)
        shown, lost = 0, 0

        def count(text: str) -> None:
            nonlocal shown, lost
            shown, lost = shown + len(text), 0
            show(text)

        while True:
            try:
                asyncio.run(self._tail(job, shown, count))
                info = self.get(job)
                if finished(info):
                    return info
            except UserError:
                lost += 1
                if lost > RECONNECTS:
                    raise
            time.sleep(RECONNECT_SECONDS if lost else 0.5)

    def stop(self, job: str) -> bool:
        """End a job and wait for it; False where it had ended already."""
        if finished(self.get(job)):
            return False
        with self._errors():
            self._client.stop_job(job)
        deadline = time.monotonic() + STOP_SECONDS
        while not finished(self.get(job)):
            if time.monotonic() > deadline:
                raise UserError(f"{job} was told to stop and still runs: ask 'raysweep status'")
            time.sleep(0.5)
        return True

    async def _tail(self, job: str, skip: int, show: Callable[[str], object]) -> None:
        """One connection's worth of a log, which Ray always sends from its beginning."""
        seen = 0
        with self._errors():
            async for text in self._client.tail_job_logs(job):
                fresh = text[max(0, skip - seen) :]
                seen += len(text)
                if fresh:
                    show(fresh)

    def _results(self, results: str, allow_local: bool) -> str:
        """Results as the driver must be told; local folders only where all nodes see them."""
        path = local_folder(results)
        if path is None:
            return results
        if not allow_local and self._hosts() != {socket.gethostname()}:
            raise UserError(
                f"results folder {path} would land on the nodes at {self.address}: use s3:// or "
                "gs://, or add --yes if all nodes share this folder"
            )
        return str(path)

    def _hosts(self) -> set[str]:
        """Names of the machines in the cluster; a tunnel to a head is not this machine."""
        with self._errors():
            answer = self._client._do_request("GET", "/nodes?view=hostNameList")
            answer.raise_for_status()
            return set(answer.json()["data"]["hostNameList"])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._user_error(error) from error

    def _user_error(self, error: Exception) -> UserError:
        return _explain(error, self.address)


def finished(job: JobDetails) -> bool:
    """Whether a job has ended, well or not."""
    return job.status.is_terminal()


def describe(job: JobDetails) -> dict[str, Any]:
    """What `status` shows of a job."""
    metadata = job.metadata or {}
    start = job.start_time
    end = job.end_time or int(time.time() * 1000)
    return {
        "job": job.submission_id,
        "status": str(job.status.value),
        "study": metadata.get(STUDY),
        "results": metadata.get(RESULTS),
        "started": datetime.fromtimestamp(start / 1000, UTC).isoformat(" ", "seconds")
        if start
        else None,
        "minutes": round((end - start) / 60_000, 1) if start else None,
        "message": outcome(job),
    }


def outcome(job: JobDetails) -> str:
    """What Ray says of how a job stands, without the end of its log that Ray appends."""
    said = (job.message or "").split(", last available logs")[0]
    return " ".join(said.split())[:300]


def read_env_file(path: Path) -> dict[str, str]:
    """KEY=VALUE lines; empty lines and those that start with # are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the env file {path}: {error}") from None
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key.strip()):
            raise UserError(f"{path}:{number}: write it as KEY=VALUE")  # never echo a secret
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        variables[key.strip()] = value
    return variables


def _reach(address: str) -> None:
    """Whether something listens there; Ray's own client would wait for minutes."""
    try:
        parts = urlsplit(address)
        usual = {"http": 80, "https": 443}[parts.scheme]
        host, port = parts.hostname, parts.port or usual
    except (ValueError, KeyError):
        host, port = None, 0
    if not host:
        raise UserError(f"address {address}: write it as http://HEAD:8265, the Jobs address")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {address} ({error.strerror or error}): check that the head is up "
            "and that the tunnel to its dashboard port is open"
        ) from None


def _connect(address: str) -> JobSubmissionClient:
    for name in _OVERRIDES:  # Ray lets these win over the address that it is given
        os.environ.pop(name, None)
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if given or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        raise _explain(error, address) from error


def _explain(error: Exception, address: str) -> UserError:
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError) or _http_status(error) in (401, 403):
        return UserError(
            f"the head at {address} refuses the token: set RAY_AUTH_TOKEN_PATH to the file with "
            "the token that the cluster was started with"
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"the head at {address} could not do it: {reason}")


def _http_status(error: Exception) -> int | None:
    """The status that a request was answered with, as each of Ray's HTTP clients tells it."""
    response = getattr(error, "response", None)
    for status in (getattr(response, "status_code", None), getattr(error, "status", None)):
        if isinstance(status, int):
            return status
    found = re.match(r"Request failed with status code (\d{3})\b", str(error))
    return int(found[1]) if found else None


def show(text: str) -> None:
    """Print part of a log as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()
