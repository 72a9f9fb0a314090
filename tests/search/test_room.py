"""Where trials find room: a machine that never has it says so; late nodes get the data."""

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.nodes import Cluster, Driver
from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.search.run import run
from raysweep.study import Study

pytestmark = pytest.mark.ray

SPACE = {
    "study": "room",
    "model": {"sequence_length": 32},
    "scales": [
        {"name": "a", "d_model": 8, "layers": 1, "heads": 1},
        {"name": "b", "d_model": 16, "layers": 1, "heads": 1},
    ],
    "horizons": [{"tokens": 20_000}],
    "search": {
        "strategy": "qmc",
        "trials_per_cell": 1,
        "extend_edges": False,
        "learning_rate": {"low": 1e-3, "high": 1e-2},
        "batch_sequences": {"low": 4, "high": 4},
    },
    "data": {"max_megabytes": 1, "validation_sequences": 16},
}


def test_a_cell_that_this_machine_never_holds_is_refused(tmp_path: Path) -> None:
    small, large = SPACE["scales"]
    study = Study.from_dict(SPACE | {"scales": [small, large | {"resources": {"workers": 512}}]})
    with pytest.raises(UserError, match=r"^cell dense-b-20ktok needs CPU 512; .* --address$"):
        run(study, results_uri=str(tmp_path / "r"))
    assert Results.open(tmp_path / "r").to_pandas().empty


def test_a_node_that_joins_after_the_start_fetches_the_corpus(
    tmp_path: Path, assert_study_complete
) -> None:
    """The head stands alone at first, and the driver's own copy of the corpus is not the node's."""
    cache = tmp_path / "cache"
    with Cluster(head_cpus=0) as cluster:
        cluster.start_head()
        env = cluster.env | {"RAYSWEEP_CACHE": str(cache)}
        driver = Driver(tmp_path, SPACE, "--address", cluster.address, env=env)
        try:
            driver.until(lambda: "waiting for it to grow" in driver.log)
            shutil.rmtree(cache / "corpora")
            cluster.env["RAYSWEEP_CACHE"] = str(tmp_path / "cache-of-the-node")
            cluster.add_worker()
            assert driver.wait() == 0, driver.log
        finally:
            driver.kill()
    assert os.listdir(tmp_path / "cache-of-the-node" / "corpora")
    assert_study_complete(driver.results, trials=1, cells=2)
