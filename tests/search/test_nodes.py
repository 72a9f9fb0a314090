"""What is said of nodes that cannot do their part."""

import dataclasses

import pytest

from raysweep.search.nodes import NodeReport, fingerprint, look_at_nodes, problems
from raysweep.study import Study

GOOD = NodeReport("a", gpus=2, fingerprint="f", gpu_bytes=(80_000_000_000,) * 2)


@pytest.fixture(scope="module")
def cells():
    study = Study.from_dict(
        {
            "study": "s",
            "scales": [{"params": 1e8}, {"params": 3e9}],
            "horizons": [{"tokens_per_param": 20}],
            "resources": {"gpus_per_worker": 1},
        }
    )
    return study.cells


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"fingerprint": None, "error": "No module named 'raysweep'"},
            "cannot import raysweep: No",
        ),
        ({"fingerprint": "g"}, "has another version of raysweep"),
        ({"gpu_bytes": ()}, "PyTorch can use none there"),
        ({"gpu_bytes": (24_000_000_000,)}, "24 GB of GPU memory a worker, and cell dense-3B-20tpp"),
    ],
)
def test_one_line_a_node(cells, changes, text):
    bad = dataclasses.replace(GOOD, name="b", **changes)
    (line,) = problems([GOOD, bad], cells, "f")
    assert line.startswith("node b")
    assert text in line


def test_nothing_is_said_of_nodes_that_will_do(cells):
    assert problems([GOOD, dataclasses.replace(GOOD, gpus=0, gpu_bytes=())], cells, "f") == []
    small = dataclasses.replace(GOOD, gpu_bytes=(24_000_000_000,))
    workers = {"workers": 8, "strategy": "fsdp"}
    shared = [
        dataclasses.replace(c, resources=c.resources.model_copy(update=workers)) for c in cells
    ]
    assert problems([small], shared, "f") == []
    assert len(problems([small], cells, "f")) == 1


def test_shared_gpus_want_the_multi_process_service(cells):
    half = [
        dataclasses.replace(c, resources=c.resources.model_copy(update={"gpus_per_worker": 0.5}))
        for c in cells[:1]
    ]
    (line,) = problems([GOOD], half, "f")
    assert "nvidia-cuda-mps-control" in line
    assert problems([dataclasses.replace(GOOD, mps=True)], half, "f") == []
    assert problems([GOOD], cells, "f") == []


@pytest.mark.ray
def test_a_node_that_claims_a_gpu(repo, cells):
    import ray
    from ray._private.authentication_test_utils import reset_auth_token_state

    reset_auth_token_state()
    environment = {"env_vars": {"PYTHONPATH": str(repo)}}
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
    )
    try:
        (report,) = look_at_nodes()
        assert report.fingerprint == fingerprint()
        assert report.gpus == 1
        (line,) = problems([report], cells, fingerprint())
        assert "PyTorch can use none there" in line
    finally:
        ray.shutdown()
