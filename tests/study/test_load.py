"""Search-space files: what loads, and what each mistake says."""

from pathlib import Path
from typing import get_args

import pytest

from raysweep.errors import UserError
from raysweep.scaling.optima.literature import PUBLISHED_LAWS
from raysweep.study import Study
from raysweep.study.load import load_search_space
from raysweep.study.schema import LawKey

MINIMAL = """\
study: tiny
scales:
  - {d_model: 32, layers: 2, heads: 2}
horizons:
  - tokens_per_param: 20
search:
  trials_per_cell: 3
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return _write


def test_minimal_file_gives_one_dense_cell(write) -> None:
    study = Study.load(write(MINIMAL))
    (cell,) = study.cells
    assert (cell.name, cell.architecture) == ("dense-d32x2-20tpp", "dense")
    assert cell.tokens == 20 * cell.counts.params_active_non_embedding


def test_matched_moe_has_the_dense_twins_active_width_and_horizon(write) -> None:
    text = MINIMAL.replace("{d_model: 32,", "{d_model: 32, d_ff: 96,")
    study = Study.load(write(text), ["architectures={dense: {}, moe: {experts: 8, top_k: 2}}"])
    dense, moe = sorted(study.cells, key=lambda c: c.architecture)
    assert moe.tokens == dense.tokens
    assert moe.shape.expert_ff * moe.shape.top_k == dense.shape.d_ff
    router = moe.shape.layers * moe.shape.d_model * moe.shape.experts
    extra = moe.counts.params_active_non_embedding - dense.counts.params_active_non_embedding
    assert extra == router


@pytest.mark.parametrize(
    ("line", "replaced_by", "expected"),
    [
        ("study: tiny", "study: ../up", "space.yaml:1: study: String should match"),
        ("study: tiny", "stduy: tiny", "unknown key 'stduy': did you mean 'study'?"),
        ("  trials_per_cell: 3", "  trials_per_cel: 3", "space.yaml:7: unknown key"),
        ("  trials_per_cell: 3", "  trials_per_cel: 3", "did you mean 'trials_per_cell'?"),
        ("  trials_per_cell: 3", "  trials_per_cell: many", "(got 'many')"),
        (
            "  trials_per_cell: 3",
            "  learning_rate: {low: 1, high: 0.1}",
            "space.yaml:7: search.learning_rate: learning_rate low 1 must be below high 0.1",
        ),
        ("  trials_per_cell: 3", "  batch_sequences: {low: 5}", "no power of two: use 4"),
        ("heads: 2", "heads: 3", "must split into 3 heads"),
        ("heads: 2", "heads: 2, params: 1e6", "give either params or a shape"),
        (", heads: 2", "", "a scale needs either params, or d_model, layers and heads"),
        ("tokens_per_param: 20", "{tokens: 20, tokens_per_param: 1}", "a horizon is one of"),
        ("tokens_per_param: 20", "tokens: 3", "out of range"),
        ("horizons:", "horizon:", "unknown key 'horizon': did you mean 'horizons'?"),
        ("study: tiny", "study: [", "not valid YAML"),
        ("study: tiny", "study: tiny\nstudy: two", "'study' is given twice (first on line 1)"),
        ("study: tiny", "study: &a tiny\ndescription: *a", "aliases are not allowed"),
        ("study: tiny", "study: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_each_mistake_names_place_and_mend(write, line, replaced_by, expected) -> None:
    assert line in MINIMAL
    with pytest.raises(UserError) as caught:
        Study.load(write(MINIMAL.replace(line, replaced_by)))
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert str(write("")) in message or "scales.0" in message


def test_missing_file_names_a_near_one(write, tmp_path: Path) -> None:
    write(MINIMAL)
    with pytest.raises(UserError, match=r"not found: did you mean .*space\.yaml"):
        Study.load(tmp_path / "spice.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.trials_per_cell", "write it as key.subkey=value"),
        ("scales.7.layers=2", "no index of 1 entries"),
        ("study.x=2", "holds a single value"),
        ("search.trial_per_cell=2", "did you mean 'trials_per_cell'?"),
        ("architectures.moe.expert=3", "did you mean 'experts'?"),
        ("data.tokenizer.train_vocab=300", "did you mean 'train_vocab_size'?"),
        ("trials_per_cell=8", "--set trials_per_cell=8: unknown key 'trials_per_cell': did you "),
        ("trials_per_cell=8", "'trials_per_cell' in search? --set search.trials_per_cell=8"),
        ("serach.trials_per_cell=3", "did you mean 'search'? --set search.trials_per_cell=3"),
        ("lr=1e-3", "'learning_rate' in search, which holds low, high,"),
        ("bs=4", "'batch_sequences' in search"),
        ("search.batch_size=4", "did you mean 'batch_sequences', which holds low"),
        ("wd=0.1", "--set recipe.weight_decay=0.1"),
        ("n_trials=4", "--set search.trials_per_cell=4"),
        ("scales.0.n_layers=3", "did you mean 'layers'?"),
        ("foo.bar=2", "--set foo.bar=2: unknown key 'foo': known here: study,"),
        ("search.learning_rate.low=5", "--set search.learning_rate.low=5: search.learning_rate: "),
        ("recipe.schedule=cosin", "(got 'cosin'): did you mean 'cosine'?"),
        ("without=[kaplen]", "did you mean 'kaplan'?"),
        ("literature=[steplaw]", "did you mean 'step_law'?"),
    ],
)
def test_bad_overrides(write, override, expected) -> None:
    with pytest.raises(UserError) as caught:
        load_search_space(write(MINIMAL), [override])
    assert expected in str(caught.value)


def test_files_may_name_every_published_law(write) -> None:
    assert get_args(LawKey) == tuple(PUBLISHED_LAWS)
    space = load_search_space(write(MINIMAL + "literature: [step_law, deepseek]\n"))
    assert space.literature == ("step_law", "deepseek")


def test_overrides_may_be_values(write) -> None:
    study = Study.load(write(MINIMAL), set={"search.trials_per_cell": 9, "scales.0.layers": 3})
    assert study.space.search.trials_per_cell == 9
    assert study.cells[0].shape.layers == 3


def test_overrides_reach_into_lists_and_new_sections(write) -> None:
    space = load_search_space(
        write(MINIMAL), ["scales.0.layers=3", "recipe.schedule=wsd", "search.trials_per_cell=9"]
    )
    assert (space.scales[0].layers, space.recipe.schedule) == (3, "wsd")
    assert space.search.trials_per_cell == 9


def test_unknown_cell_lists_the_known(write) -> None:
    with pytest.raises(UserError, match=r"known: dense-d32x2-20tpp"):
        Study.load(write(MINIMAL)).cell("nope")


def test_trial_key_depends_on_what_determines_the_result_and_on_nothing_else(write) -> None:
    study = Study.load(write(MINIMAL))
    cell = study.cells[0]
    key = study.trial(cell, "data", 1e-3, 8, 0).key
    assert study.trial(cell, "data", 1e-3, 8, 0).key == key
    assert len({key, *(study.trial(cell, *a).key for a in DIFFERENT)}) == 1 + len(DIFFERENT)
    renamed = Study.load(write(MINIMAL), ["study=other", "resources.cpus_per_worker=2"])
    assert renamed.trial(renamed.cells[0], "data", 1e-3, 8, 0).key == key
    longer = Study.load(write(MINIMAL), ["recipe.weight_decay=0.2"])
    assert longer.trial(longer.cells[0], "data", 1e-3, 8, 0).key != key


DIFFERENT = [
    ("other", 1e-3, 8, 0),
    ("data", 2e-3, 8, 0),
    ("data", 1e-3, 16, 0),
    ("data", 1e-3, 8, 1),
]


def test_budgets_of_flops_become_each_models_tokens(write) -> None:
    """An IsoFLOP profile: every cell of a budget costs the same, whatever its model; a scale may
    have horizons of its own."""
    text = """study: iso
architectures: {dense: {}, moe: {experts: 8, top_k: 2, expert_size: 1.0}}
scales:
  - {params: 1e6}
  - {params: 4e6, horizons: [{flops: 1e14}, {tokens: 1e7}]}
horizons: [{flops: 1e14}, {flops: 3e14}]
"""
    study = Study.load(write(text))
    budgets = {c.name: c.flops for c in study.cells if c.name.endswith("flops")}
    assert list(budgets) == [  # the smallest model first
        *("dense-1M-1e14flops", "moe-1M-1e14flops", "dense-4M-1e14flops", "moe-4M-1e14flops"),
        *("dense-1M-3e14flops", "moe-1M-3e14flops"),
    ]
    for name, flops in budgets.items():
        assert flops == pytest.approx(3e14 if "3e14" in name else 1e14, rel=1e-6)
    assert study.cell("dense-4M-10Mtok").tokens == 10**7
    with pytest.raises(UserError, match="horizons is missing"):
        Study.load(write(text.replace("horizons: [{flops: 1e14}, {flops: 3e14}]\n", "")))
