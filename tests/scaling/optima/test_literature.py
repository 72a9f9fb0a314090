"""The literature as data: what each law says, and the prior that they make together."""

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.scaling.optima.literature import (
    COLUMNS,
    INFLATE,
    PUBLISHED_LAWS,
    REFERENCE,
    flat_prior,
    law_keys,
    literature_prior,
    published_answers,
)
from raysweep.study.shape import RunSize

RUN = RunSize(
    1e9,
    1e11,
    params_total_non_embedding=1e9,
    params_active=1.1e9,
    head_params=5e7,
    flops=6 * 1.05e9 * 1e11,
)


def test_laws_say_what_their_sources_state():
    """Values worked out by hand from the formulas."""
    said = {
        "step_law": (1.79 * 1e9**-0.713 * 1e11**0.307, 0.58 * 1e11**0.571),
        "openeurollm": (
            0.3714 * 1e9**-0.417 * 1e11**0.086,
            4096 * 9.901e-5 * 1e9**0.145 * 1e11**0.46,
        ),
        "deepseek": (0.3118 * 6e20**-0.125, 0.2920 * 6e20**0.3271),
        "moonlight": (0.0127 * 6e20**-0.057, 0.0065 * 6e20**0.4138),
        "porian": (3.7 * 1.05e9**-0.36, 0.7576 * 1.05e9**0.703),
        "bjorck": (1.55e-3 * 100**-0.32, None),
        "kaplan": (0.003239 - 0.0001395 * np.log(1e9), None),
        "schaipp": (None, 0.667 * 1e11**0.566),
        "zhang": (None, 512 * 22.91 * 100**0.47),
    }
    for key, (rate, batch) in said.items():
        law = PUBLISHED_LAWS[key]
        for value, found in ((rate, law.learning_rate(RUN)), (batch, law.batch_tokens(RUN))):
            assert (found is None) == (value is None), key
            if value is not None:
                assert found == pytest.approx(value, rel=1e-9), key


def test_a_law_is_off_its_own_statements_by_no_more_than_rounding():
    """Where a law is one of N and D and nothing else, its statements give back its exponents."""
    law = PUBLISHED_LAWS["openeurollm"]
    rows = np.array([s.row for s in law.statements])
    values = np.array([s.value for s in law.statements])
    theta = np.linalg.lstsq(rows, values, rcond=None)[0]
    np.testing.assert_allclose(theta[1:3], [-0.417, 0.086], atol=1e-6)
    np.testing.assert_allclose(theta[5:7], [0.145, 0.460], atol=1e-6)


def test_every_law_has_its_source_setup_and_range():
    for key, law in PUBLISHED_LAWS.items():
        assert law.key == key
        assert law.source
        assert law.recipe
        assert law.measured
        assert law.convention
        assert law.learning_rate_formula or law.batch_formula
        assert law.statements or law.notes, key


def test_the_prior_is_a_plausible_set_up():
    prior = literature_prior()
    sd = np.sqrt(prior.scale.diagonal()) / INFLATE
    assert np.exp(prior.mean[0]) == pytest.approx(1.35e-3, rel=0.03)
    assert np.exp(prior.mean[4]) == pytest.approx(5.38e5, rel=0.03)
    np.testing.assert_allclose(prior.mean[1:4], [-0.266, -0.038, -0.190], atol=0.01)
    np.testing.assert_allclose(prior.mean[5:], [0.177, 0.481, 0.035], atol=0.01)
    np.testing.assert_allclose(sd, [0.52, 0.23, 0.19, 0.24, 0.53, 0.17, 0.12, 0.16], atol=0.012)
    assert np.linalg.eigvalsh(prior.scale)[0] > 0
    # A law at one batch, and one along D = r N, speak of a mixture: rate and batch go together.
    correlation = prior.scale / np.outer(sd, sd) / INFLATE**2
    assert correlation[0, 4] == pytest.approx(0.38, abs=0.03)


def test_a_law_left_out_takes_those_on_its_data_with_it():
    without = literature_prior(["step_law"])
    assert "step_law" not in without.laws
    assert "schaipp" not in without.laws
    assert np.abs(without.mean - literature_prior().mean).max() > 0.05
    alone = literature_prior(trust=["deepseek"])
    assert set(alone.laws) == {"deepseek"}
    with pytest.raises(UserError, match="no published law is left"):
        literature_prior(without=["deepseek"], trust=["deepseek"])


def test_left_out_laws_lie_where_the_others_lead_one_to_expect():
    """Mahalanobis distance over its dimensions, of each law's estimate from the others' prior."""
    off = []
    for key in literature_prior().laws:
        theta = literature_prior().laws[key]
        prior = literature_prior([key])
        away = theta - prior.mean
        off.append(float(away @ np.linalg.solve(prior.scale / INFLATE**2, away)) / len(away))
    assert np.mean(off) < 2
    assert max(off) < 6


def test_the_centre_moves_intercepts_along_the_exponents():
    prior = literature_prior()
    there = prior.at((REFERENCE[0] + 1.0, REFERENCE[1] - 2.0))
    assert there.mean[0] == pytest.approx(prior.mean[0] + prior.mean[1] - 2 * prior.mean[2])
    np.testing.assert_allclose(there.at(REFERENCE).scale, prior.scale, atol=1e-12)
    assert there.scale[0, 0] > prior.scale[0, 0]


def test_names_are_read_as_people_write_them():
    assert law_keys(["steplaw", "Step-Law", "OpenEuroLLM"]) == ("step_law", "openeurollm")
    with pytest.raises(UserError, match="did you mean deepseek"):
        law_keys(["deepseak"])


def test_priors_of_other_kinds():
    flat = flat_prior()
    assert flat.mean[1] == flat.mean[2] == 0
    off = literature_prior().shifted(np.log(4))
    assert off.mean[0] - literature_prior().mean[0] == pytest.approx(np.log(4))
    assert len(COLUMNS) == 4


def test_answers_stand_beside_models_they_were_made_for():
    dense = {a["law"] for a in published_answers(RUN)}
    moe = {a["law"] for a in published_answers(RunSize(1e9, 1e11, experts=8, top_k=2))}
    assert "deepseek" in dense
    assert "ling" not in dense
    assert "ling" in moe
    assert "deepseek" not in moe
    assert "nanochat" not in dense | moe
