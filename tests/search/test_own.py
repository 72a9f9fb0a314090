"""A user's own training on a real local Ray: rows of every kind of end."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from raysweep.results import Results
from raysweep.search.run import run
from raysweep.study import Study

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("own")]

CODE = """
    import json, math, os, pathlib, time

    def loss(lr, batch):
        return 2.5 + 0.05 * math.log(lr / 0.01) ** 2 + 0.02 * math.log(batch / 256) ** 2

    def train(run):
        what = run.settings["what"]
        if what == "raises":
            raise ValueError("no such optimizer")
        if what == "nothing":
            return None
        if what == "hangs":
            time.sleep(600)
        if what == "nan":
            return float("nan")
        run.report(run.tokens / 2, 4.0)
        found = loss(run.learning_rate, run.batch_tokens)
        return {"loss": found, "decay": run.settings["weight_decay"]}

    def together(run):
        import torch
        from torch import distributed, nn
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        total = torch.tensor([float(run.rank + 1)])
        distributed.all_reduce(total)
        assert run.world_size == 2 and total.item() == 3.0
        assert not run.should_stop()
        what = run.settings["what"]
        once = pathlib.Path(__file__).with_name(what)
        first = not once.exists()
        distributed.barrier()
        once.touch()
        run.report(run.tokens / 2, float("nan") if what == "nan" and first else 4.0)
        if what == "raises" and first and run.rank == 1:
            raise ValueError("only here")
        if what == "both" and first:
            raise ValueError("everywhere")
        if what == "worker_dies" and first and run.rank == 1:
            os._exit(1)
        model(torch.ones(2, 4)).sum().backward()
        if what == "ends":
            distributed.destroy_process_group()
        return {"loss": loss(run.learning_rate, run.batch_tokens), "pid": os.getpid()}
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_search_test.py").write_text(textwrap.dedent(CODE))
    return folder


def space(training: dict[str, Any], *whats: str, **more: Any) -> dict[str, Any]:
    scale = {"params": 1e5, "flops_per_token": 7e5}
    return {
        "study": "own",
        "training": training,
        "model": {"sequence_length": 16},
        "scales": [
            scale | {"name": what, "settings": {"what": what, "n": k}}
            for k, what in enumerate(whats)
        ],
        "horizons": [{"tokens": 64_000}],
        "search": {"trials_per_cell": 3, "extend_edges": False},
        **more,
    }


def rows(results: Path) -> pd.DataFrame:
    return Results.open(results).to_pandas()


def test_every_end_is_a_row_and_the_study_goes_on(code: Path, tmp_path: Path) -> None:
    training = {"function": "own_search_test:train", "timeout": 2, "settings": {"optimizer": "x"}}
    given = space(training, "good", "raises", "nothing", "hangs", "nan")
    given["search"]["also"] = {"weight_decay": {"low": 0.01, "high": 1.0}}
    study = Study.from_dict(given, code)
    run(study, results_uri=str(tmp_path / "results"))
    frame = rows(tmp_path / "results")
    assert frame["trial_key"].is_unique
    by_scale = {str(scale): part for scale, part in frame.groupby("scale")}
    good = by_scale["good"]
    assert set(good["status"]) == {"finished"}
    assert len(good) == 3
    assert good["source"].tolist() == ["own"] * 3
    recipes = [json.loads(text) for text in good["recipe"]]
    assert {recipe["optimizer"] for recipe in recipes} == {"x"}
    decays = [recipe["weight_decay"] for recipe in recipes]
    assert decays == [json.loads(text)["decay"] for text in good["metrics"]]
    assert len(set(decays)) == 3
    assert (good["params_active_non_embedding"] == 1e5).all()
    assert good["params_total"].isna().all()
    reasons = {
        "raises": "raised ValueError: no such optimizer (own_search_test.py:",
        "nothing": "returned None",
        "hangs": "took longer than training.timeout (2 s)",
    }
    for scale, reason in reasons.items():
        assert set(by_scale[scale]["status"]) == {"crashed"}, scale
        assert all(reason in text for text in by_scale[scale]["reason"]), by_scale[scale]["reason"]
        assert len(by_scale[scale]) in (3, 4)  # two may run at once
    assert set(by_scale["nan"]["status"]) == {"diverged"}
    curves = Results.open(tmp_path / "results").curves(good["trial_key"])
    assert curves["tokens"].tolist() == [32_000.0] * 3
    assert not list((tmp_path / "results/checkpoints").glob("*/*"))


def test_several_workers_have_a_process_group(code: Path, tmp_path: Path) -> None:
    """Trials that fail or are ended on one worker or on all leave the group warm. One that kills a
    worker is begun again in a new one."""
    training = {"function": "own_search_test:together"}
    whats = ("both", "ends", "good", "nan", "raises", "worker_dies")
    given = space(training, *whats, resources={"workers": 2})
    given["search"]["trials_per_cell"] = 1
    run(Study.from_dict(given, code), results_uri=str(tmp_path / "results"))
    frame = rows(tmp_path / "results").sort_values("started_at")
    found = {str(scale): part["status"].tolist() for scale, part in frame.groupby("scale")}
    assert found == {
        "nan": ["diverged", "finished"],
        "raises": ["crashed", "finished"],
        "both": ["crashed", "finished"],
        "ends": ["finished"],
        "good": ["finished"],
        "worker_dies": ["finished"],
    }
    finished = frame[frame["status"] == "finished"]
    assert (finished["world_size"] == 2).all()
    crashed = frame[frame["status"] == "crashed"].set_index("scale")["reason"]
    for what, says in (("raises", "only here"), ("both", "everywhere")):
        assert f"ValueError: {says} (own_search_test.py:" in crashed[what]
    pids = {row["scale"]: json.loads(row["metrics"])["pid"] for _, row in finished.iterrows()}
    assert len({pids[what] for what in whats[:-1]}) == 1
    assert pids["worker_dies"] != pids["good"]
