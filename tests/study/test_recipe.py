"""Keys of a recipe: old trial keys stand, new ones count, and what cannot be is refused."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from raysweep.study import Recipe, Study

FIRST_KEYS = {
    "dense": "92a66e7df88a08ee",
    "laptop": "0597c77aa74271d5",
    "moe": "13b17567be37c40a",
    "smoke": "965931ec396b847e",
    "wang2024": "81e55cd7a8ed3e9b",
    "yun2024": "bbd210d766381662",
}
"""Of each shipped study's trials as they were before recipes had other optimizers."""


@pytest.mark.parametrize("name", list(FIRST_KEYS))
def test_keys_of_rows_written_before_stand(repo: Path, name: str) -> None:
    study = Study.load(repo / "search_spaces" / f"{name}.yaml")
    keys = "".join(study.trial(cell, "data", 1e-3, 8, 0).key for cell in study.cells)
    assert hashlib.sha256(keys.encode()).hexdigest()[:16] == FIRST_KEYS[name]


def space(recipe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    scales = [{"d_model": 32, "layers": 4, "heads": 2}, {"d_model": 64, "layers": 4, "heads": 4}]
    given = {
        "study": "s",
        "architectures": {"moe": {"experts": 8, "top_k": 2, **changes.pop("moe", {})}},
        "model": {"sequence_length": 16},
        "scales": scales,
        "horizons": [{"tokens": 1e5}],
        "recipe": recipe or {},
    }
    return {**given, **changes}


MUP = {"parametrization": "mup", "base_d_model": 32}
DIFFERENT: list[dict[str, Any]] = [
    {"optimizer": "muon"},
    {"optimizer": "muon", "momentum": 0.9},
    {"group_rates": {"head": 2.0}},
    {"weight_decay_rule": "independent", "weight_decay": 1e-4},
    {"weight_decay_rule": "timescale"},
    {"weight_decay_rule": "timescale", "weight_decay_timescale": 0.3},
    {"weight_decay_on": ["matrices"]},
    {"weight_decay_on": ["matrices", "head"]},
    MUP,
    {**MUP, "base_d_model": 64},
    {**MUP, "parametrization": "completep", "base_layers": 4},
    {"schedule": "linear"},
    {"schedule": "wsd"},
    {"schedule": "wsd", "decay_shape": "1-sqrt"},
    {"ema_tokens": 1e6},
]


def test_every_key_counts() -> None:
    def key(recipe: dict[str, Any], **moe: Any) -> str:
        study = Study.from_dict(space(recipe, moe=moe))
        return study.trial(study.cells[0], "data", 1e-3, 8, 0).key

    keys = {key({}), *map(key, DIFFERENT), key({}, first_dense=1), key({}, route_scale=2.5)}
    assert len(keys) == 3 + len(DIFFERENT)
    assert key({"momentum": 0.95, "group_rates": {"head": 1}, "ema_tokens": None}) == key({})


def test_a_row_says_what_differs() -> None:
    assert "momentum" not in Recipe().record()
    said = Recipe.model_validate({"optimizer": "muon", "group_rates": {"head": 2}}).record()
    assert (said["optimizer"], said["group_rates"]["head"]) == ("muon", 2.0)


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"recipe": {"parametrization": "mup"}}, "needs base_d_model"),
        ({"recipe": {**MUP, "parametrization": "completep"}}, "needs base_layers"),
        ({"recipe": MUP, "model": {"tie_embeddings": True}}, "set model.tie_embeddings to false"),
        (
            {"recipe": MUP, "scales": [{"d_model": d, "layers": 1, "heads": 2} for d in (32, 64)]},
            "heads of one size .* 16, 32: change scales' heads",
        ),
        ({"recipe": {"weight_decay_rule": "independent"}}, "set it to 1e-4"),
        ({"recipe": {"decay_shape": "1-sqrt"}}, "decay_shape is of schedule: wsd"),
        (
            {"recipe": {"branches": True, "schedule": "wsd", "warmup_tokens": 100,
                        "weight_decay_rule": "timescale"}},
            "timescale differs by horizon",
        ),
        ({"moe": {"first_dense": 4}}, "first_dense 4 leaves no MoE layer of 4"),
        ({"data": {"validation": {"a": [], "b": []}}}, "only one set"),
        ({"data": {"validation": {"a": []}, "minimise": "b"}}, "minimise 'b' is no set .*: a"),
        ({"data": {"validation": {"a": []}, "validation_paths": ["b"]}}, "exclude each other"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes: dict[str, Any], mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        Study.from_dict(space(**changes))


def test_first_layers_stay_dense() -> None:
    for every, expected in ((1, (2, 3)), (2, (3,))):
        study = Study.from_dict(space(moe={"first_dense": 2, "moe_every": every}))
        assert study.cells[0].shape.moe_layers == expected


def test_the_set_that_is_minimised_comes_first() -> None:
    data = {"validation": {"a": [], "b": ["b.txt"], "c": ["c.txt"]}, "minimise": "b"}
    study = Study.from_dict(space(data=data))
    trial = study.trial(study.cells[0], "data", 1e-3, 8, 0)
    assert trial.validation_sets == ("b", "a", "c")
    assert study.space.data.held_out == (("b.txt",), (), ("c.txt",))
