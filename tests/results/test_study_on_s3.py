"""A whole study whose results live on S3 only, one request in ten failing while it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.object_store import CREDENTIALS, ObjectStore
from raysweep.results import Results
from raysweep.results.filesystem import Storage

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
SMOKE = str(REPO / "search_spaces" / "smoke.yaml")


def raysweep(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raysweep", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | CREDENTIALS | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )


def keys_in(storage: Storage, file: str) -> list[str]:
    data = storage.read("trials", file)
    assert data is not None
    return pq.read_table(pa.BufferReader(data)).column("trial_key").to_pylist()


def test_run_damage_run_again_status_and_fit(
    bucket: str, store: ObjectStore, tmp_path: Path, assert_study_complete
) -> None:
    store.share = 0.1
    done = raysweep("run", SMOKE, "--results", bucket, cwd=tmp_path)
    store.share = 0.0
    assert done.returncode == 0, done.stderr
    assert store.failed > 3
    rows = assert_study_complete(bucket)
    assert Results.open(bucket).storage.read(".driver.lease") is None, "given back"

    # A damaged file costs its own trials again and no others. (Files of some may be merged.)
    storage = Results.open(bucket).storage
    files = {each.base_name: keys_in(storage, each.base_name) for each in storage.list("trials")}
    file = min(files, key=lambda name: len(files[name]))
    kept = [key for other, keys in files.items() if other != file for key in keys]
    damaged = set(rows["trial_key"]) - set(kept)
    storage.write(b"junk", "trials", file)
    again = raysweep("run", SMOKE, "--results", bucket, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"{len(damaged)} trials in" in again.stderr
    now = assert_study_complete(bucket)
    starts = [f.set_index("trial_key").loc[kept, "started_at"].tolist() for f in (rows, now)]
    assert starts[0] == starts[1]
    status = raysweep("status", bucket, "--json", cwd=tmp_path)
    assert [c["statuses"] for c in json.loads(status.stdout)["cells"]] == [{"finished": 2}] * 4
    assert "optima" in json.loads(raysweep("fit", bucket, "--json", cwd=tmp_path).stdout)
    page = tmp_path / "reports" / "smoke" / "index.html"
    assert page.stat().st_size > 10_000, "the report is made from the bucket"
