"""Outputs of `vllm bench latency` (stored here, of our own making) become a profile that serves."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.vllm_profile import main, profile
from raysweep.errors import UserError
from raysweep.scaling.compute.roofline import Profile, ServedModel, find_gpu
from raysweep.scaling.compute.serving import Serving, serving_cost

OUTPUTS = Path(__file__).parent / "vllm"


def test_outputs_become_a_profile_that_serves(tmp_path: Path) -> None:
    main([str(OUTPUTS), "-o", str(tmp_path / "profile.csv")])
    read = Profile.read(tmp_path / "profile.csv")
    model = ServedModel(3e8, experts=8)
    assert read.prefill(model, 1, 64, 161) == pytest.approx(0.002 * 5 * 1.5)
    assert read.decode(model, 1, 256, 330) == pytest.approx(0.004 * 2 * (1 + 256 / 400))
    serving = Serving(find_gpu("h100"), 2.0, latency=read, gpu_counts=read.gpus)
    small, large = (serving_cost(ServedModel(n, experts=8), serving) for n in (3e8, 3e9))
    assert large.dollars_per_million == pytest.approx(6 * small.dollars_per_million, rel=0.01)


def test_what_does_not_serve_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no output"):
        profile(tmp_path)
    shutil.copy(OUTPUTS / "e8-g1-n3e8-b64-o1.json", tmp_path)
    with pytest.raises(UserError, match="e8-g1-n3e\\+08-b64: measure it with one generated token"):
        profile(tmp_path)
    bad = tmp_path / "e8-g1-n3e8-b64-o65.json"
    bad.write_text(json.dumps({"latency": 1}))
    with pytest.raises(UserError, match="is no output of vllm bench latency"):
        profile(tmp_path)
    bad.rename(tmp_path / "mine.json")
    with pytest.raises(UserError, match="name it as in"):
        profile(tmp_path)
