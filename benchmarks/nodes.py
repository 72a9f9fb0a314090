"""A Ray cluster of several nodes on this machine, and a driver, that can be killed and replaced."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.schema import ARROW_SCHEMA

REPO = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_SECONDS = 120.0
PATIENT_START = f"""
import sys, time
from ray._private import node, services
from ray.scripts.scripts import main

get_node, until = services.get_node, time.monotonic() + {START_SECONDS}

def patient(*args):
    while True:
        try:
            return get_node(*args)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)

services.get_node = patient
node.Node.start_ray_client_server = lambda *_: None
if "--include-dashboard=false" in sys.argv:
    node.Node.start_api_server = lambda *_, **__: None
sys.exit(main())
"""
"""`ray start`, which gives its node half a minute: too little on a busy machine. It starts no
server for Ray Client, which nobody asks, and none for a dashboard that is off."""
_AT_EACH_STEP = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "raysweep.training.learner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), wrap(module.Learner))
        return spec

def wrap(learner):
    learn = learner.learn

    def learn_and_more(self, *args, **kwargs):
        result = learn(self, *args, **kwargs)
        after_step(self)
        return result

    learner.learn = learn_and_more

sys.meta_path.insert(0, Finder())
"""
_PORTS = (
    "dashboard-agent-listen",
    "dashboard-agent-grpc",
    "metrics-export",
    "runtime-env-agent",
)


@dataclass
class Node:
    """One `ray start`, leader of the session that all of its processes belong to."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return self.folder.with_suffix(".log").read_text(errors="replace")

    @property
    def last_words(self) -> str:
        """The end of what `ray start` and the node's daemons wrote."""
        files = [self.folder.with_suffix(".log"), *self.folder.glob("session_2*/logs/*.*")]
        ends = {file: file.read_text(errors="replace")[-1500:] for file in files if file.is_file()}
        return "\n".join(f"--- {file.name}\n{text}" for file, text in ends.items() if text)

    def kill(self) -> None:
        """SIGKILL to every process of the node at once, as when its machine fails."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def pids(self) -> list[int]:
        """All processes of the node: `ray start` itself, the raylet, its workers."""
        return session_pids(self.process.pid)


@dataclass
class Cluster:
    """Nodes started by `ray start`, as on real machines: each with a folder and ports of its own,
    one token for all. Close it when done."""

    head_cpus: int = 1
    dashboard: bool = False
    env: dict[str, str] = field(default_factory=dict)
    """An environment to call the cluster from."""
    workers: list[Node] = field(default_factory=list)
    head: Node | None = None

    def __post_init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # short: sockets have 107 bytes
        self.port, self.dashboard_port, self._client_port = free_ports(3)
        self._started = 0
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",  # Tune takes none of those
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **self.env,
        }

    @property
    def address(self) -> str:
        """Of the head, for `ray.init` and `raysweep run`."""
        return f"{HOST}:{self.port}"

    @property
    def jobs_address(self) -> str:
        """Of the Jobs API; needs the dashboard."""
        return f"http://{HOST}:{self.dashboard_port}"

    def start_head(self, *more: str) -> Node:
        """Start the head, or a new one at the address of one that was killed; `more` options."""
        options = ["--head", "--port", str(self.port), "--num-cpus", str(self.head_cpus)]
        options += ["--ray-client-server-port", str(self._client_port)]
        options += ["--dashboard-host", HOST, "--dashboard-port", str(self.dashboard_port)]
        options += [f"--include-dashboard={str(self.dashboard).lower()}", *more]
        if "--autoscaling-config" not in more:
            options += ["--no-monitor"]
        self.head = self._start(options)
        if self.dashboard:
            self._wait(self.head, lambda: listens(self.dashboard_port))
        return self.head

    def add_worker(self, cpus: int = 1) -> Node:
        """Start a node that joins the head."""
        node = self._start(["--address", self.address, "--num-cpus", str(cpus)])
        self.workers.append(node)
        return node

    def kill(self, node: Node) -> None:
        """Kill a node, the head or a worker, without a word."""
        node.kill()
        if node is self.head:
            self.head = None
        else:
            self.workers.remove(node)

    def close(self) -> None:
        """End all nodes and remove their folders."""
        nodes = [*self.workers, *([self.head] if self.head else [])]
        for node in nodes:
            node.process.send_signal(signal.SIGTERM)
        for node in nodes:
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(10)
        for node in nodes:
            node.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, options: list[str]) -> Node:
        try:
            return self._start_once(options)
        except RuntimeError as error:  # another process may have taken one of its ports since
            print(f"{error}\nonce more", file=sys.stderr)
            return self._start_once(options)

    def _start_once(self, options: list[str]) -> Node:
        self._started += 1
        # A folder of its own: nodes would unpack submitted code over each other's.
        folder = self.root / f"n{self._started}"
        command = [sys.executable, "-c", PATIENT_START, "start", *options, "--block"]
        command += ["--node-ip-address", HOST, "--object-store-memory", "100000000"]
        command += ["--include-log-monitor", "false"]  # one process less a node
        command += ["--temp-dir", str(folder)]
        for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True):
            command += [f"--{name}-port", str(port)]
        with open(folder.with_suffix(".log"), "wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=self.env, start_new_session=True
            )
        node = Node(folder, process)
        try:
            self._wait(node, lambda: "runtime started" in node.log)
        except RuntimeError:
            node.kill()
            raise
        return node

    def _wait(self, node: Node, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node did not start: {node.last_words}")
            time.sleep(0.2)


class Driver:
    """`raysweep run` in a session of its own, started as often as it takes."""

    def __init__(
        self,
        folder: Path,
        search_space: dict[str, Any] | Path,
        *options: str,
        env: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(search_space, Path):
            space = search_space
        else:
            space = folder / "space.yaml"
            space.write_text(yaml.safe_dump(search_space))
        self.results, self.starts = folder / "results", 0
        self._folder, self._env = folder, env
        self._command = [sys.executable, "-m", "raysweep", "run", str(space), *options]
        self._command += [
            "--results",
            str(self.results),
            "--report",
            str(folder / "report"),
            "--no-live",
        ]
        self.start()

    def start(self) -> None:
        """The same command, once more."""
        self.starts += 1
        with open(self._log_file, "wb") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=REPO,
                env=self._env,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What the latest start has printed."""
        return self._log_file.read_text(errors="replace")

    @property
    def _log_file(self) -> Path:
        return self._folder / f"start{self.starts}.log"

    def rows(self) -> pd.DataFrame:
        """What stands in the results folder now; nothing before there is one."""
        with suppress(UserError):
            return Results.open(self.results).to_pandas()
        return ARROW_SCHEMA.empty_table().to_pandas()

    def checkpoints(self) -> list[Path]:
        """Of trials that are running, or were."""
        return sorted((self.results / "checkpoints").glob("*/checkpoint.pt"))

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def until(self, ready: Callable[[], object], seconds: float = 200.0) -> None:
        """Wait for something to happen while it runs."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait()


def at_each_step(folder: Path, code: str) -> dict[str, str]:
    """An environment in which each Python process runs `code` before anything else, and calls the
    `after_step(learner)` that it defines after each optimizer step of our trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(code + _AT_EACH_STEP)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


class Brake:
    """Holds trials back while a test does what it does to them, so that they need not be long: a
    step takes a quarter of a second while the brake is on. It is on at first."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "brake"
        self.code = f"""
import os, time

def after_step(learner):
    if os.path.exists({str(self._file)!r}):
        time.sleep(0.25)
"""
        self.env = at_each_step(folder / "shim", self.code)
        self.press()

    def press(self) -> None:
        self._file.touch()

    def release(self) -> None:
        self._file.unlink(missing_ok=True)


def session_pids(leader: int) -> list[int]:
    """Living processes of the session that a process started."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return [pid for pid in found if command_of(pid)]  # a dead one that nobody reaped has none


def command_of(pid: int) -> str:
    """A process's command line, which Ray's workers set to what they do; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


ONE_WORKER, TRAIN_WORKER = "ray::ImplicitFunc.train", "ray::RayTrainWorker"
"""What Ray calls a process in which a trial runs: Tune's while it trains, or one of several of
Ray Train. (The Tune process of a trial on several workers bears the first name too.)"""


def in_trial(pids: Iterable[int], names: tuple[str, ...] = (ONE_WORKER, TRAIN_WORKER)) -> list[int]:
    """Those of some processes in which a trial runs."""
    return [pid for pid in pids if command_of(pid).startswith(names)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, none of them given before: what they are for may listen late,
    or never. They lie below those that the system hands out, where each of the processes that run
    tests side by side has a thousand of its own."""
    return [next(port for port in _own_ports if _is_free(port)) for _ in range(count)]


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe, suppress(OSError):
        probe.bind((HOST, port))
        return True
    return False


_first = 20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_own_ports = itertools.cycle(_first + (os.getpid() + k) % 1000 for k in range(1000))


def listens(port: int) -> bool:
    """Whether anything accepts connections on a port of this machine."""
    with closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
