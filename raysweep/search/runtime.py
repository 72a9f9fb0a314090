"""Starting Ray, or joining a cluster: quiet, private, and leaving nothing behind."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raysweep.data import cache_folder
from raysweep.errors import UserError

_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_prestart_worker_first_driver": "0",
}
"""Our rows replace Tune's own logs and snapshots; output and signals are ours; nothing phones
home. Workers start as they are needed: those that Ray starts before are not what Tune takes."""

LOCAL_OBJECT_STORE_BYTES = 200_000_000
MAX_TEMP_DIR = 40
"""Ray puts sockets under its folder: 64 bytes more, and a socket's path may have 107."""
_SCRATCH = "run"


@contextmanager
def ray_runtime(address: str | None, cpus: int | None = None) -> Iterator[Path]:
    """Ray running for the time of the block: joined at `address`, or started on this machine.

    A local Ray answers only to a token, which lives in this process's environment. Yields a scratch
    folder that is removed afterwards. Raises UserError if the cluster cannot be reached.
    """
    ours = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(ours)
    address = cluster_address(address)
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    from raysweep.search.ray_internals import few_processes, read_token_again

    read_token_again()
    scratch = _scratch_folder()
    try:
        if address is None:
            with few_processes():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                    _temp_dir=str(scratch),
                )
        else:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"cannot join the Ray cluster at {address}: {reason}; check the address, the "
                    "token (RAY_AUTH_TOKEN_PATH) and that the head is up"
                ) from error
        yield scratch
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        for name in ours:  # else the user's own runs of Tune would leave no logs
            os.environ.pop(name, None)


def cluster_address(address: str | None) -> str | None:
    """Of the cluster to join: as given, or by RAY_ADDRESS. None where Ray is started here."""
    address = address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def cluster_nodes() -> Mapping[str, Mapping[str, float]]:
    """Resources of the nodes that are alive and are to stay, by node id."""
    import ray

    from raysweep.search.ray_internals import draining_nodes

    alive = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    going = draining_nodes()
    return {node: resources for node, resources in alive.items() if node not in going}


def _scratch_folder() -> Path:
    """A new folder in the user's cache, or in the temporary folder where that path is too long."""
    folder = cache_folder.root() / f"{_SCRATCH}{os.getpid()}"
    if len(str(folder)) > MAX_TEMP_DIR:
        folder = Path(tempfile.gettempdir()) / folder.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{_SCRATCH}*"):  # by drivers that were killed
        owner = left.name.removeprefix(_SCRATCH)
        if owner.isdigit() and (int(owner) == os.getpid() or not _alive(int(owner))):
            shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
