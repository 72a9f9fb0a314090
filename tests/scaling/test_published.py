"""Published laws, against values worked out from their formulas by hand."""

import math

import pytest

from raysweep.scaling.published import PUBLISHED_LAWS, Setting, published_answers

# 1e9 = 10^9 and 1e11 = 10^11, so that powers are powers of ten.
DENSE = Setting(params_active_non_embedding=1e9, tokens=1e11, flops_per_token=1e10, head_params=5e8)


@pytest.mark.parametrize(
    ("law", "rate", "batch"),
    [
        ("step_law", 1.79 * 10 ** (-0.713 * 9 + 0.307 * 11), 0.58 * 10 ** (0.571 * 11)),
        # C without the head: 1e10 - 6 * 5e8 a token
        ("deepseek", 0.3118 * 7e20**-0.125, 0.2920 * 7e20**0.3271),
        ("porian", 0.0047 * (1500 / 108) ** (-1 / 3), 2048 * 160 * (1500 / 108) ** (2 / 3)),
        ("ludziejewski", math.exp(8.39) * 10 ** (-0.81 * 9), None),
        ("schaipp", None, 0.667 * 10 ** (0.566 * 11)),
        ("bjorck", None, None),
        ("zhang", None, None),
        ("nanochat", None, None),
    ],
)
def test_answers(law, rate, batch):
    published = PUBLISHED_LAWS[law]
    assert published.learning_rate(DENSE) == (rate if rate is None else pytest.approx(rate))
    assert published.batch_tokens(DENSE) == (batch if batch is None else pytest.approx(batch))


def test_moe_settings_use_the_sources_counts():
    moe = Setting(
        params_active_non_embedding=1e9,
        params_total_non_embedding=8e9,
        tokens=1e11,
        experts=64,
        top_k=8,
    )
    step = PUBLISHED_LAWS["step_law"]
    assert step.learning_rate(moe) == pytest.approx(1.79 * 8e9**-0.713 * 1e11**0.307)
    sparse = PUBLISHED_LAWS["ludziejewski"].learning_rate(moe)
    dense = PUBLISHED_LAWS["ludziejewski"].learning_rate(DENSE)
    assert sparse is not None
    assert dense is not None
    assert sparse / dense == pytest.approx(64**-0.25)
    assert moe.flops == 6 * 1e9 * 1e11


def test_without_a_known_head_the_law_that_counts_it_is_silent():
    bare = Setting(params_active_non_embedding=1e9, tokens=1e11)
    assert PUBLISHED_LAWS["porian"].batch_tokens(bare) is None
    assert bare.flops_non_embedding == bare.flops == 6e20


def test_only_laws_of_the_kind_answer():
    dense = {a["law"] for a in published_answers(DENSE)}
    assert "deepseek" in dense
    assert "ling" not in dense
    moe = Setting(params_active_non_embedding=1e9, tokens=1e11, experts=8, top_k=2)
    answers = {a["law"] for a in published_answers(moe)}
    assert {"ling", "step_law", "ludziejewski"} == answers


def test_every_law_names_its_source_and_what_was_not_verified():
    for key, law in PUBLISHED_LAWS.items():
        assert law.key == key
        assert law.source
        assert law.convention
        assert law.learning_rate_formula or law.batch_formula
    assert [k for k, law in PUBLISHED_LAWS.items() if not law.verified] == ["zhang"]
