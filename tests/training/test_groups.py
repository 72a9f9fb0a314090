"""Rules of weight decay and rates by group: identities, on what an optimizer does to weights."""

import math

import pytest
import torch

from raysweep.training.horizon_metrics import HorizonMetrics
from raysweep.training.learner import Learner
from raysweep.training.parallel import Workers


@pytest.fixture
def left(spec, corpus):
    return lambda **changes: _left(spec("moe", **changes), corpus)


def _left(trial, corpus) -> dict[str, float]:
    """What is left of each weight after a run whose gradients are all zero: decay alone."""
    learner = Learner(trial, corpus, torch.device("cpu"), Workers())
    learner.build()
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    metrics = HorizonMetrics(trial)
    for step in range(trial.steps):
        learner.optimizer.step(metrics.rate(step))
    return {
        name: (p.norm() / before[name].norm()).item()
        for name, p in learner.model.named_parameters()
    }


MATRIX = "attention.0.qkv"
ROLES = ("embedding", "head", MATRIX, "feed_forward.1.router.weight", "norm")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fixed_shrinks_by_rate_times_decay(spec, left, optimizer):
    recipe = {"schedule": "linear", "final_lr_fraction": 0.0, "optimizer": optimizer}
    found = left(learning_rate=0.02, recipe=recipe)
    metrics = HorizonMetrics(spec("moe", learning_rate=0.02, recipe=recipe))
    expected = math.prod(1 - 0.1 * metrics.rate(step) for step in range(40))
    assert expected < 0.97
    for name in ("head", MATRIX, "feed_forward.1.gate_up"):
        assert found[name] == pytest.approx(expected, rel=1e-5)
    for name in ("embedding", "feed_forward.1.router.weight", "norm"):
        assert found[name] == 1


def test_independent_does_not_know_the_peak(left):
    recipe = {"weight_decay_rule": "independent", "weight_decay": 0.001, "schedule": "constant",
              "warmup_fraction": 0.0}  # fmt: skip
    one, other = (left(learning_rate=rate, recipe=recipe) for rate in (0.001, 0.1))
    assert one[MATRIX] == pytest.approx(0.999**40, rel=1e-5)
    assert other[MATRIX] == pytest.approx(0.999**40, rel=1e-5)
    assert one["head"] == one["embedding"] == 1


def test_timescale_is_that_of_the_run_whatever_batch_and_peak(left):
    recipe = {"weight_decay_rule": "timescale", "weight_decay_timescale": 0.5,
              "schedule": "constant", "warmup_fraction": 0.0}  # fmt: skip
    for batch, rate in ((8, 0.001), (2, 0.1)):
        found = left(batch_sequences=batch, learning_rate=rate, recipe=recipe)
        steps = 40 * 8 // batch
        assert found[MATRIX] == pytest.approx((1 - 1 / (0.5 * steps)) ** steps, rel=1e-4)
        assert found[MATRIX] == pytest.approx(math.exp(-1 / 0.5), rel=0.06)


@pytest.mark.parametrize("rule", ["fixed", "timescale"])
def test_decay_does_not_depend_on_the_parametrization(left, rule):
    recipe = {"weight_decay_rule": rule}
    wide = {"parametrization": "completep", "base_d_model": 4, "base_layers": 1}
    standard, other = left(recipe=recipe), left(recipe=recipe | wide)
    for name in (MATRIX, "attention.0.out", "head"):
        assert other[name] == pytest.approx(standard[name], rel=1e-5)


def test_what_decays_is_as_asked(left):
    for place, role in enumerate(("embedding", "head", "matrices", "router", "norms")):
        found = left(recipe={"weight_decay_on": (role,)})
        assert [found[name] < 1 for name in ROLES] == [i == place for i in range(5)]


def test_rates_by_group_are_fixed_ratios(spec, corpus):
    """Adam's first step is the learning rate, whatever the gradient."""
    ratios = {"embedding": 3.0, "head": 0.5, "router": 2.0, "norms": 0.25}
    trial = spec("moe", recipe={"group_rates": ratios, "weight_decay": 0.0, "clip_norm": None})
    learner = Learner(trial, corpus, torch.device("cpu"), Workers())
    learner.build()
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.learn(0, 0.01, want_trace=False)
    largest = [
        (learner.model.get_parameter(name) - before[name]).abs().max().item() for name in ROLES
    ]
    assert largest == pytest.approx([0.03, 0.005, 0.01, 0.02, 0.0025], rel=1e-3)
