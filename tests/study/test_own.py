"""Study files of a user's own training: sizes, and what is refused, in one line."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysweep.errors import UserError
from raysweep.study import Study
from raysweep.study.own import TOLD, fill_in
from raysweep.study.plan import make_plan, summary_words

DENSE = {"name": "s", "settings": {"n": 1}, "params": "10M", "flops_per_token": 7e7}
CODE = """
    def mapping(settings):
        n = 1e6 * settings["n"]
        return {"params_active": n, "params_total": n * settings.get("experts", 1),
                "params_embedding": 2e5, "flops_per_token": 7 * n}

    def module(settings):
        import torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self, d):
                super().__init__()
                self.embedding = nn.Embedding(100, d)
                self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
                self.head = nn.Linear(d, 100, bias=False)
                self.head.weight = self.embedding.weight

            def forward(self, tokens):
                x = self.embedding(tokens)
                y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                return self.head(x + self.down(self.up(y)))

        with torch.device("meta"):
            return Model(settings["d"])

    def unknown(settings): return {"params": 1e6, "flops": 7e6}
    def raises(settings): return settings["width"]
    def text(settings): return "large"
"""


def space(scale: dict[str, Any], training: dict[str, Any] | None = None, **more: Any) -> Any:
    return {
        "study": "own",
        "training": training or {"function": "lab:train"},
        "scales": [scale],
        "horizons": [{"tokens_per_param": 20}],
        **more,
    }


def without(*names: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in DENSE.items() if k not in names} | more


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab_sizes.py").write_text(textwrap.dedent(CODE))
    return folder


def test_given_sizes_are_those_of_the_cell() -> None:
    study = Study.from_dict(space(DENSE))
    (cell,) = study.cells
    assert (cell.name, cell.tokens) == ("dense-s-20tpp", 200_000_000)
    assert cell.flops == 7e7 * 2e8
    assert cell.size.params_total_non_embedding == 1e7
    (planned,) = make_plan(study).cells
    assert planned.flops_6nd_per_trial == 6 * 1e7 * 2e8
    assert planned.params_total is None  # embeddings are not known
    said = str(make_plan(study))
    assert "6ND" in said
    assert "1.2e16" in said


@pytest.mark.parametrize(
    ("budget", "at_most", "said"),
    [
        (None, 1.128e17, ""),
        (1.1281e17, 1.1281e17, ""),
        (1e22, 4.512e17, "of 1e22 adds trials where they tell most, up to 4.51e17 FLOPs"),
        (2e17, 2e17, "adds trials where they tell most, up to 2e17 FLOPs"),
        (8.46e16, 8.46e16, "pays for 0.75 of these FLOPs: trials that no longer fit are left out."),
        (1e15, 1e15, "left out, all of dense-m-20tpp, where one costs more than that"),
    ],
)
def test_a_budget_of_flops_is_in_the_plan(budget: float | None, at_most: float, said: str) -> None:
    large = without(name="m", settings={"n": 2}, params="20M", flops_per_token=1.4e8)
    small = without(params="2M", flops_per_token=1e7)
    search = {"trials_per_cell": 2, "total_flops": budget}
    plan = make_plan(Study.from_dict(space(small, scales=[small, large], search=search)))
    assert plan.flops == pytest.approx(1.128e17)
    assert plan.to_dict()["flops_at_most"] == pytest.approx(at_most)
    assert plan.to_dict()["total_flops"] == budget
    words = summary_words(plan)
    assert said in words if said else "total_flops" not in words
    assert plan.never_trained == (("dense-m-20tpp",) if budget == 1e15 else ())


def test_experts_have_active_total_and_dense_counts() -> None:
    moe = without("params", params_active="10M", params_total="60M", params_dense="9M")
    study = Study.from_dict(
        space(moe, architectures={"moe": {"experts": 8, "top_k": 2, "settings": {"jitter": 0.1}}})
    )
    (cell,) = study.cells
    assert cell.tokens == 20 * 9_000_000
    assert cell.size.routing == (8, 2)
    assert cell.own is not None
    assert cell.own.settings == {"experts": 8, "top_k": 2, "jitter": 0.1, "n": 1}


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (without("params"), r"scales.0 as dense: params .* is missing: .*training.size function"),
        (without("flops_per_token"), r"flops_per_token .* is missing: .*6 N is 6e\+07"),
        (without(flops_per_token=1e9), "17 times 6 N of 10M parameters.*or give params_embedding"),
        (without(flops_per_token=2e7), "0.33 times 6 N of 10M parameters"),
        (without(params_total="5M"), "params_total 5M is below the active 10M"),
        (without(params_total="30M"), "is 3 times the active 10M, too many for a dense model"),
        (
            without(params_active="100M", flops_per_token=6e8),
            "params 10M and params_active 100M are",
        ),
        (without(d_model=64), "of your own, give them under settings"),
        ({"d_model": 64, "layers": 2, "heads": 2}, "d_model and the like are yours to read"),
    ],
)
def test_sizes_that_are_missing_or_contradict(scale: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Study.from_dict(space(scale))


def test_a_small_model_with_a_large_vocabulary_is_no_contradiction() -> None:
    Study.from_dict(space(without(params="1M", params_embedding="12M", flops_per_token=4.5e7)))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"training": {}}, "training is one of function, command and external"),
        ({"training": {"command": ["x"]}}, "a command needs result"),
        ({"training": {"function": "train"}}, "training.function"),
        ({"recipe": {"weight_decay": 0.2}}, "recipe is of raysweep's own models"),
        ({"model": {"qk_norm": False}}, "model is of raysweep's own models, but for"),
        ({"data": {"max_megabytes": 1}}, "data is of raysweep's own models"),
        ({"training": None}, "scale 0 has settings or counts of your own models"),
    ],
)
def test_what_does_not_belong_together(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(space(DENSE) | more))
    with pytest.raises(UserError, match=says) as error:
        Study.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("training", "more", "says"),
    [
        ({}, {"search": {"also": {"scale": {"low": 1, "high": 2}}}}, "search.also.scale: every"),
        ({"settings": {"seed": 2}}, {}, "training.settings.seed: every trial has a seed already"),
        ({"settings": {"id": 2}}, {}, "training.settings.id: every trial has"),
        ({}, {"scales": [DENSE | {"settings": {"tokens": 3}}]}, "scales.0.settings.tokens: every"),
        ({}, {"architectures": {"a": {"settings": {"gpus": 3}}}}, "architectures.a.settings.gpus"),
    ],
)
def test_names_of_what_every_trial_has_are_taken(
    training: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Study.from_dict(space(DENSE, {"external": True} | training) | more)


def test_what_every_trial_is_told() -> None:
    study = Study.from_dict(space(DENSE, {"function": "lab:train", "settings": {"seed": 3}}))
    (cell,) = study.cells
    assert cell.own is not None
    assert cell.own.settings["seed"] == 3  # a function has it apart
    assert set(study.trial(cell, "d", 0.1, 4, 0).values()) == {"n", *TOLD}


def test_a_size_function_says_the_counts(lab: Path) -> None:
    training = {"function": "lab:train", "size": "lab_sizes:mapping"}
    scales = {"name": "s", "settings": {"n": 3}}
    architectures = {"dense": {}, "moe": {"experts": 4, "top_k": 1}}
    study = Study.from_dict(space(scales, training, architectures=architectures), lab)
    dense, moe = study.cell("dense-s-20tpp"), study.cell("moe-s-20tpp")
    assert dense.counts.params_active == 3.2e6
    assert moe.counts.params_total_non_embedding == 12e6
    again = Study.from_dict(yaml.safe_load(study.resolved().as_yaml()), "/")  # without the code
    assert [c.counts for c in again.cells] == [c.counts for c in study.cells]
    keys = [[s.trial(c, "d", 0.1, 4, 0).key for c in s.cells] for s in (study, again)]
    assert keys[0] == keys[1]


def test_scales_of_one_name_keep_their_own_settings(lab: Path) -> None:
    """In what is saved, and in the plan: they differ in architecture, or in horizon."""
    training = {"function": "lab:train", "size": "lab_sizes:mapping"}
    scales = [
        {"name": "s", "architectures": ["dense"], "settings": {"n": 1}},
        {"name": "s", "architectures": ["moe"], "settings": {"n": 2}, "params": "2.1M"},
        {"name": "s", "architectures": ["moe"], "settings": {"n": 3},
         "horizons": [{"tokens_per_param": 40}]},
    ]  # fmt: skip
    architectures = {"dense": {}, "moe": {"experts": 4, "top_k": 1}}
    given = space({}, training, architectures=architectures) | {"scales": scales}
    study = Study.from_dict(given, lab)
    again = Study.from_dict(yaml.safe_load(study.resolved().as_yaml()), "/")
    assert again.cells == study.cells
    assert sorted(c.own.settings["n"] for c in again.cells if c.own) == [1, 2, 3]
    targets = {cell.name: cell.params_target for cell in make_plan(study).cells}
    assert targets == {"dense-s-20tpp": None, "moe-s-20tpp": 2.1e6, "moe-s-40tpp": None}


@pytest.mark.slow
def test_a_module_is_counted(lab: Path) -> None:
    training = {"function": "lab:train", "size": "lab_sizes:module"}
    scale = {"name": "s", "settings": {"d": 32}}
    study = Study.from_dict(space(scale, training, model={"sequence_length": 16}), lab)
    counts = study.cells[0].counts
    inner, head, attention = 2 * 4 * 32 * 32, 100 * 32, 2 * 2 * 32 * 16
    assert counts.params_total_non_embedding == inner + 5 * 32
    assert counts.params_total == inner + 5 * 32 + head  # tied: counted once
    assert counts.flops_per_token == 3 * (2 * (inner + head) + attention)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lab_sizes:unknown", "unknown key 'flops': did you mean 'flops_per_token'"),
        ("lab_sizes:raises", r"failed: KeyError: 'width' \(lab_sizes.py:\d+\)"),
        ("lab_sizes:text", "it returned str: return a mapping with params"),
        ("lab_sizes:mappings", "did you mean lab_sizes:mapping"),
        ("lab_nowhere:size", "cannot be imported"),
    ],
)
def test_a_size_function_that_cannot_be_used(name: str, says: str, lab: Path) -> None:
    training = {"function": "lab:train", "size": name}
    with pytest.raises(UserError, match=says) as error:
        Study.from_dict(space({"name": "s", "settings": {"n": 1}}, training), lab)
    assert "\n" not in str(error.value)


def test_keys_follow_what_is_trained() -> None:
    study = Study.from_dict(space(DENSE))
    key = study.trial(study.cells[0], "d", 0.1, 4, 0).key
    for scale, training in (
        (without(settings={"n": 2}), None),
        (DENSE, {"function": "lab:other"}),
        (DENSE, {"function": "lab:train", "settings": {"optimizer": "muon"}}),
    ):
        other = Study.from_dict(space(scale, training))
        assert other.trial(other.cells[0], "d", 0.1, 4, 0).key != key
    timed = Study.from_dict(space(DENSE, {"function": "lab:train", "timeout": 5}))
    assert timed.trial(timed.cells[0], "d", 0.1, 4, 0).key == key


def test_words_of_a_command_are_filled_in() -> None:
    words = ["--lr={lr}", '{{"flag": {flag}, "name": "{name}"}}']
    filled = fill_in(words, {"lr": 3e-05, "flag": True, "name": "x"})
    assert filled == ["--lr=3e-05", '{"flag": true, "name": "x"}']
