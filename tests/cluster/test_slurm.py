"""The Slurm script as it is, on a Slurm of one node on this machine."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd", "unshare")
ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
HOST = os.uname().nodename.split(".")[0]

CONF = """
ClusterName=raysweep
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def find(daemon: str) -> str | None:
    return shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture
def slurm(tmp_path: Path, free_ports) -> Iterator[dict[str, str]]:
    """The environment of a client of a Slurm that is up."""
    missing = [d for d in DAEMONS if find(d) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    folder = tmp_path / "slurm"
    for name in ("", "state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    controller, daemon = free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            host=HOST,
            folder=folder,
            controller=controller,
            daemon=daemon,
            cpus=len(os.sched_getaffinity(0)),
        )
    )
    munge = ["--force", "--foreground", "--key-file", str(folder / "munge.key")]
    for name in ("socket", "pid-file", "log-file", "seed-file"):
        munge += [f"--{name}", str(folder / f"munge.{name.removesuffix('-file')}")]
    started = []
    env = os.environ | {"SLURM_CONF": str(conf)}
    try:
        for name, options in (("munged", munge), ("slurmctld", ["-D"]), ("slurmd", ["-D"])):
            command = [str(find(name)), *options]
            if name == "slurmd":
                # Ray's symmetric-run refuses a node where it sees another Ray, so this one has
                # processes of its own; Bash, the first of them, buries the dead.
                command = [*ALONE, "bash", "-c", f"{command[0]} -D; true"]
            with (folder / f"{name}.out").open("wb") as out:
                started.append(subprocess.Popen(command, stdout=out, stderr=out, env=env))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in run(["sinfo", "--noheader"], env):
            assert time.monotonic() < deadline, logs(folder)
            time.sleep(0.5)
        yield env
    finally:
        run(["scancel", "--user=root"], env)
        for process in reversed(started):
            process.kill()
            process.wait(20)


def run(command: list[str], env: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=cwd, timeout=60, check=False
    )
    return done.stdout + done.stderr


def logs(folder: Path) -> str:
    return "\n".join(p.read_text(errors="replace") for p in folder.glob("*.log"))


def test_a_study_runs_as_a_batch_job_and_again_to_continue(
    slurm, tmp_path: Path, assert_study_complete
) -> None:
    # The environment is entered as the script does it, from the folder it is submitted in.
    entry = tmp_path / ".venv" / "bin" / "activate"
    entry.parent.mkdir(parents=True)
    entry.write_text(
        f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={REPO} "
        f"RAYSWEEP_CACHE={os.environ.get('RAYSWEEP_CACHE', tmp_path / 'cache')}\n"
    )
    sizes = ["--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
    space, results = REPO / "search_spaces" / "smoke.yaml", tmp_path / "results"
    submit = ["sbatch", *sizes, str(REPO / "cluster" / "slurm.sh"), str(space), str(results)]
    texts = []
    for _ in range(2):
        said = run(submit, slurm, tmp_path)
        assert said.startswith("Submitted batch job"), said
        job = said.split()[-1]
        deadline = time.monotonic() + 280
        while run(["squeue", "--noheader", f"--jobs={job}"], slurm).strip():
            assert time.monotonic() < deadline, run(["squeue"], slurm) + logs(tmp_path / "slurm")
            time.sleep(1)
        texts.append((tmp_path / f"raysweep-{job}.log").read_text())
    assert_study_complete(results)
    assert "nothing to run" in texts[1]
    assert not list(Path.home().glob(".raysweep-token-*")), "the token of the job is gone"
