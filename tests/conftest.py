"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import pytest

if TYPE_CHECKING:
    import pandas as pd

REPO = Path(__file__).resolve().parent.parent

# Before anything imports NumPy or PyTorch, whose threads would fight with those of other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A page that is kept live costs as much as a small study; the test of it takes this away.
os.environ.setdefault("CI", "1")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public sweeps that lies beside the checkout."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"public sweeps not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def assert_study_complete() -> Callable[..., "pd.DataFrame"]:
    """Asserts that a results folder holds a finished row of every trial and no other row:
    `assert_study_complete(uri, trials=2, cells=4)`. Returns the rows."""

    def check(uri: str | Path, trials: int = 2, cells: int = 4) -> "pd.DataFrame":
        from raysweep.results import Results

        rows = Results.open(uri).to_pandas()
        assert rows["trial_key"].is_unique
        assert set(rows["status"]) == {"finished"}
        assert rows.groupby("cell").size().tolist() == [trials] * cells
        return rows

    return check


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a folder in a bucket of a real S3 server on this machine."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Servers of one process share what they hold.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    options = f"scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
    s3 = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    )
    s3.create_dir("bucket")
    yield f"s3://bucket/study?{options}"
    server.stop()


@pytest.fixture(scope="session")
def isoflop_profiles() -> Callable[..., "pd.DataFrame"]:
    """Runs of all cells of a search space of Wang et al.: `isoflop_profiles(name, (N, D), height,
    noise)`. The loss is 1.8 + height ((N / N0)^-a + a/b (D / D0)^-b), whose best N grows with
    C^0.507 dense and C^0.590 MoE, and whose two terms are alike at the N0 and D0 given."""

    def make(name: str, alike: tuple[float, float], height: float, noise: float) -> "pd.DataFrame":
        import numpy as np
        import pandas as pd

        from raysweep.study import Study

        exponents = {"dense": (0.35, 0.36), "moe": (0.30, 0.4317)}
        rng = np.random.default_rng(0)
        counts = ("params_active", "params_active_non_embedding", "params_total")
        rows = []
        for cell in Study.load(REPO / "search_spaces" / f"{name}.yaml").cells:
            a, b = exponents[cell.architecture]
            n, d = cell.counts.params_active_non_embedding, cell.tokens
            loss = 1.8 + height * ((n / alike[0]) ** -a + a / b * (d / alike[1]) ** -b)
            rows.append(
                {
                    "architecture": cell.architecture,
                    **{count: getattr(cell.counts, count) for count in counts},
                    "params_total_non_embedding": cell.counts.params_total_non_embedding,
                    "params_dense": cell.params_dense,
                    "tokens": d,
                    "flops_per_token": cell.counts.flops_per_token,
                    "experts": cell.shape.experts,
                    "top_k": cell.shape.top_k,
                    "loss": loss * np.exp(noise * rng.standard_normal()),
                }
            )
        return pd.DataFrame(rows)

    return make
