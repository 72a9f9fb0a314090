"""The deployment files: valid for the tools that read them, token on, closed to the world."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
RAY_UP = sorted(p.name for p in CLUSTER.glob("*.yaml") if p.name != "kuberay.yaml")


def load(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def start_commands(config: dict) -> tuple[str, str]:
    return "\n".join(config["head_start_ray_commands"]), "\n".join(
        config["worker_start_ray_commands"]
    )


def test_all_are_here() -> None:
    assert RAY_UP == ["aws.yaml", "gcp.yaml", "local.yaml"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_are_valid_for_ray(name: str) -> None:
    import ray

    config = load(name)
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    for commands in start_commands(config):
        script = subprocess.run(["bash", "-n"], input=commands, text=True, capture_output=True)
        assert script.returncode == 0, script.stderr


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_have_a_token_and_a_loopback_dashboard(name: str) -> None:
    config = load(name)
    for commands in start_commands(config):
        assert "export RAY_AUTH_MODE=token" in commands
    assert "--dashboard-host=127.0.0.1" in start_commands(config)[0]
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_ray_takes_the_start_commands() -> None:
    from ray._private.parameter import RayParams
    from ray.scripts.scripts import start

    texts = [(CLUSTER / "README.md").read_text()]
    texts += ["\n".join(start_commands(load(name))) for name in RAY_UP]
    lines = re.findall(r"\bray start ((?:.*\\\n)*.*)$", "\n".join(texts), re.M)
    assert len(lines) == 1 + 2 * len(RAY_UP)
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        given = start.make_context("start", words).params  # refuses options it does not know
        RayParams(**{name: given[name] for name in ("ray_client_server_port", "num_cpus")})


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_cloud_workers_are_spot_and_bounded_and_the_head_is_not(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    assert "SPOT" not in json.dumps(types["head"]).upper()
    assert "SPOT" in json.dumps(types["gpu"]).upper()
    assert 0 < types["gpu"]["min_workers"] <= types["gpu"]["max_workers"] <= config["max_workers"]
    assert types["head"]["resources"]["CPU"] == 0


def test_the_head_on_aws_may_hand_the_workers_their_role() -> None:
    """Without a profile Ray makes one for the head, which may pass no role but its own."""
    types = load("aws.yaml")["available_node_types"]
    head, worker = (types[t]["node_config"]["IamInstanceProfile"]["Arn"] for t in ("head", "gpu"))
    assert head != worker
    assert "iam:PassRole" in (CLUSTER / "README.md").read_text()


def test_the_kubernetes_job_has_the_shape_of_a_ray_job() -> None:
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["entrypoint"].startswith("python -m raysweep run ")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    installed = re.search(r"^ray==(\S+)$", (CLUSTER.parent / "constraints.txt").read_text(), re.M)
    assert installed
    assert cluster["rayVersion"] == installed[1]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
    for worker in cluster["workerGroupSpecs"]:
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
        limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) >= 1


def test_the_slurm_script_is_sound_shell() -> None:
    script = CLUSTER / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        found = subprocess.run([shellcheck, script], text=True, capture_output=True, check=False)
        assert found.returncode == 0, found.stdout
    text = script.read_text()
    assert re.search(r'\bsrun [^|;&]*--cpus-per-task="\$cpus"', text), "srun inherits it no more"
    wait = re.search(r"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=(\d+)", text)
    assert wait
    assert int(wait[1]) >= 300
    assert "RAY_AUTH_MODE=token" in text


def test_nothing_listens_to_the_world() -> None:
    for path in CLUSTER.iterdir():
        text = path.read_text()
        assert "0.0.0.0" not in text, path
        assert "LoadBalancer" not in text.replace("never a LoadBalancer", ""), path
        assert not re.search(r"dashboard-host[= ]+(?!127\.0\.0\.1)", text), path


@pytest.mark.parametrize("name", [*RAY_UP, "kuberay.yaml", "slurm.sh"])
def test_what_to_edit_is_marked(name: str) -> None:
    assert "# EDIT" in (CLUSTER / name).read_text()
    assert name in (CLUSTER / "README.md").read_text()


def test_the_dashboard_shows_what_the_driver_measures(repo) -> None:
    from raysweep.search.overview import GAUGES

    board = json.loads((repo / "cluster" / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert set(re.findall(r"ray_(raysweep_\w+)", shown)) == set(GAUGES)
