"""A Ray cluster of two nodes on this machine, with a token, on ports of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

HOST = "127.0.0.1"


@dataclass(frozen=True)
class LocalCluster:
    """Where its Jobs API listens, its token, and an environment to call it from."""

    address: str
    token: str
    env: dict[str, str]


def unused_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all held at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((HOST, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    return unused_ports


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """A head and a worker node, started by `ray start` as on real machines; one CPU each."""
    temp = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # short: sockets have 107 bytes
    token = secrets.token_hex(16)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    gcs, dashboard, client, *rest = unused_ports(11)
    head = ["--head", "--port", str(gcs), "--temp-dir", str(temp / "h")]
    head += ["--dashboard-host", HOST, "--dashboard-port", str(dashboard)]
    head += ["--ray-client-server-port", str(client)]
    nodes = [_start(head, rest[:4], env, temp / "head.log")]
    try:
        _wait(lambda: listens(gcs) and listens(dashboard), nodes[0], temp / "head.log")
        # A folder of its own: the nodes would unpack the code over each other's.
        worker = ["--address", f"{HOST}:{gcs}", "--temp-dir", str(temp / "w")]
        nodes.append(_start(worker, rest[4:], env, temp / "worker.log"))
        _wait(
            lambda: "runtime started" in _text(temp / "worker.log"), nodes[1], temp / "worker.log"
        )
        yield LocalCluster(f"http://{HOST}:{dashboard}", token, env)
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            with suppress(subprocess.TimeoutExpired):
                node.wait(10)
        _kill_leftovers(temp)
        shutil.rmtree(temp, ignore_errors=True)


def _start(
    options: list[str], ports: list[int], env: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    names = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "metrics-export",
        "runtime-env-agent",
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block"]
    command += ["--node-ip-address", HOST, "--num-cpus", "1", "--object-store-memory", "100000000"]
    for name, port in zip(names, ports, strict=True):
        command += [f"--{name}-port", str(port)]
    with open(log, "wb") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, env=env, start_new_session=True
        )


def _wait(ready, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, _text(log)
        assert time.monotonic() < deadline, _text(log)
        time.sleep(0.2)


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def _kill_leftovers(temp: Path) -> None:
    """Only what was started for this cluster: its folder stands in every command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{temp}/".encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
