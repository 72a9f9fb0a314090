"""Keys of a recipe: old trial keys stand, new ones count, and what cannot be is refused."""

from typing import Any

import pytest

from raysweep.study import Recipe, Study


def space(recipe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    scales = [{"d_model": 32, "layers": 4, "heads": 2}, {"d_model": 64, "layers": 4, "heads": 4}]
    given = {
        "study": "s",
        "architectures": {"moe": {"experts": 8, "top_k": 2, **changes.pop("moe", {})}},
        "model": {"sequence_length": 16},
        "scales": scales,
        "horizons": [{"tokens": 1e5}],
        "data": {"validation_sequences": 256},  # the default when the first keys were made
        "recipe": recipe or {},
    }
    return {**given, **changes}


FIRST_KEYS: dict[str, dict[str, Any]] = {
    "402c42741b732ea0aeab": {},
    "2ba44a91b9f7d15f8393": {"architectures": {"dense": {}}},
    "a44c700fd992ea97e426": {"moe": {"scores": "sigmoid", "balance": "bias", "moe_every": 2}},
    "8424e2f90100077145a2": {
        "recipe": {
            "schedule": "wsd",
            "branches": True,
            "warmup_tokens": 1000.0,
            "weight_decay": 0.0,
            "final_lr_fraction": 0.0,
        }
    },
    "5cbd3dde77241a90114c": {
        "recipe": {"optimizer": "adamw", "init_std": 0.02, "z_loss": 0.0001, "beta2_rule": "batch"},
        "data": {"validation_sequences": 512},
    },
}
"""Keys of trials as they were before recipes had other optimizers."""


@pytest.mark.parametrize("key", list(FIRST_KEYS))
def test_keys_of_rows_written_before_stand(key: str) -> None:
    study = Study.from_dict(space(**FIRST_KEYS[key]))
    assert study.trial(study.cells[-1], "data", 1e-3, 8, 0).key == key


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
