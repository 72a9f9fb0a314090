"""The day of the first card, at toy size on a CPU, without what such a machine may lack."""

import json
import os
import subprocess
import sys

import pytest

from raysweep.results import Results

LACKING = (
    "ray", "optuna", "pyarrow", "pandas", "fsspec", "scipy", "rich", "tokenizers", "typer",
    "matplotlib", "jinja2", "cmaes", "transformers", "pytest",
)  # fmt: skip
HOOK = f"""
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name.split(".")[0] in {LACKING!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = without
"""


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES") == "0", reason="at toy size")
def test_all_parts_and_a_second_call_goes_on(repo, tmp_path):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "sitecustomize.py").write_text(HOOK)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path / 'lacking'}:{repo}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    out = tmp_path / "day"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(out), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=repo, capture_output=True, text=True, timeout=580,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    # The checks have tests of their own. Something stands already, and something went wrong.
    out.mkdir()
    known = {"parts": {"mfu": {"dense-s-20ktok": {"kept": 1}, "moe-s-20ktok": {"error": "x"}}}}
    (out / "gpu_day.json").write_text(json.dumps(known))
    parts = ("mfu", "noise", "packing", "fsdp", "ladder")
    text = run("--minutes", "60", *(word for part in parts for word in ("--part", part)))
    day = json.loads((out / "gpu_day.json").read_text())
    assert text.splitlines()[-1].endswith("complete"), text
    assert day["parts"]["mfu"]["dense-s-20ktok"] == {"kept": 1}
    assert day["parts"]["mfu"]["moe-s-20ktok"]["tokens_per_second"] > 0
    assert set(day["parts"]) == set(parts)
    assert [day["parts"]["fsdp"][n]["status"] for n in "12"] == ["finished"] * 2
    assert day["parts"]["packing"]["2"]["tokens_per_second"] > 0
    assert len((out / "rows.jsonl").read_text().splitlines()) == 4

    # With Arrow at hand, the rows become a results folder.
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(out), "--results"]
    whole = environment | {"PYTHONPATH": str(repo)}
    subprocess.run(command, env=whole, cwd=repo, check=True, timeout=100)
    frame = Results.open(out / "results").to_pandas()
    assert frame["status"].tolist() == ["finished"] * 4
    assert set(frame["architecture"]) == {"dense", "moe"}

    # Errors of one part are kept, and the rest goes on.
    (out / "rows.jsonl").write_text("no JSON\n")
    day["parts"].pop("ladder")
    day["parts"].pop("noise")
    (out / "gpu_day.json").write_text(json.dumps(day))
    text = run("--minutes", "60", "--part", "ladder", "--part", "noise")
    day = json.loads((out / "gpu_day.json").read_text())
    assert "JSONDecodeError" in day["parts"]["ladder"]["dense-s-20ktok"]["error"]
    assert "cost" in day["parts"]["noise"]["cost"]
    assert "missing ladder dense-s-20ktok" in text
