"""The shipped search spaces: they load, plan, and match what their comments promise."""

import json
from pathlib import Path

import numpy as np
import pytest

from raysweep.scaling.loss.data import held_budgets
from raysweep.study import Study
from raysweep.study.plan import make_plan
from raysweep.study.schema import SearchSpace

REPO = Path(__file__).resolve().parents[2]
SPACES = sorted((REPO / "search_spaces").glob("*.yaml"))


def test_all_promised_spaces_are_there() -> None:
    names = {p.stem for p in SPACES}
    assert names >= {"laptop", "smoke", "dense", "moe", "wang2024", "wang2024-small", "yun2024"}


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_every_space_plans(path: Path) -> None:
    plan = make_plan(Study.load(path))
    assert plan.trials > 0
    assert plan.flops > 0
    json.dumps(plan.to_dict())
    for cell in plan.cells:
        # Exact counts and 6ND agree but for attention and head, which weigh more in tiny models.
        least = 0.7 if cell.params_active_non_embedding > 1e8 else 0.05
        assert least < cell.flops_6nd_per_trial / cell.flops_per_trial <= 1.01
        if cell.params_target is not None and cell.name.startswith("dense"):
            assert cell.params_active_non_embedding == pytest.approx(cell.params_target, rel=0.1)


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_every_space_names_its_cost_and_schema(path: Path) -> None:
    head = path.read_text().split("study:")[0]
    assert "Cost:" in head
    assert "$schema=schema.json" in head


def test_laptop_ladder_spans_a_factor_of_eight() -> None:
    study = Study.load(REPO / "search_spaces/laptop.yaml")
    for architecture in ("dense", "moe"):
        cells = [c for c in study.cells if c.architecture == architecture]
        params = sorted(c.counts.params_active_non_embedding for c in cells)
        assert len(params) >= 3
        assert params[-1] / params[0] >= 8


def test_wang2024_is_matched_in_active_parameters() -> None:
    study = Study.load(REPO / "search_spaces/wang2024.yaml")
    for cell in study.cells:
        ratio = cell.counts.params_active_non_embedding / cell.params_dense
        assert ratio == pytest.approx(1, rel=0.01)


def test_yun2024_has_the_sizes_of_table_1() -> None:
    study = Study.load(REPO / "search_spaces/yun2024.yaml")
    sizes = sorted({cell.params_dense for cell in study.cells})
    assert sizes == pytest.approx([81.4e6, 184e6, 289.4e6, 679.5e6], rel=0.005)
    assert len(study.cells) == 80
    assert study.space.serving.reference == "moe4"


@pytest.mark.parametrize("name", ["wang2024", "wang2024-small"])
def test_wang2024_holds_budgets_while_sizes_vary(name: str) -> None:
    study = Study.load(REPO / f"search_spaces/{name}.yaml")
    for architecture in study.space.architectures:
        own = [c for c in study.cells if c.architecture == architecture]
        level = held_budgets(np.array([c.flops for c in own]))
        assert level is not None
        assert np.bincount(level).min() >= 3
        assert max(c.tokens for c in own) < 100e9


def test_yun2024_total_parameters_follow_the_papers_rule() -> None:
    # Total = (1 + (E - 1) / 3) N holds where the feed-forward is two thirds of the model.
    study = Study.load(REPO / "search_spaces/yun2024.yaml")
    for cell in study.cells:
        rule = (1 + (cell.shape.experts - 1) / 3) * cell.params_dense
        assert cell.counts.params_total_non_embedding == pytest.approx(rule, rel=0.06)


def test_committed_schema_is_current() -> None:
    committed = json.loads((REPO / "search_spaces/schema.json").read_text())
    assert committed == json.loads(json.dumps(SearchSpace.model_json_schema())), (
        "run: raysweep schema > search_spaces/schema.json"
    )


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_gpu_ladders_suit_their_cards(name: str) -> None:
    """Sizes that kernels like, and workers whose memory holds the state: 80 GB, 16 bytes each."""
    study = Study.load(REPO / f"search_spaces/{name}.yaml")
    for cell in study.cells:
        shape, resources = cell.shape, cell.resources
        assert shape.head_dim == 128
        assert all(n % 128 == 0 for n in (shape.d_model, shape.d_ff, shape.vocab_size))
        assert 2 * shape.expert_ff % 128 == 0
        cards = resources.workers if resources.strategy == "fsdp" else 1
        assert 16 * cell.counts.params_total / cards < 40e9
        assert (resources.strategy == "fsdp") == (16 * cell.counts.params_total > 40e9)
        active = cell.counts.params_active_non_embedding
        assert active == pytest.approx(cell.params_dense, rel=0.03)
    assert study.space.data.source != "machine"
