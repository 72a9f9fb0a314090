"""Recipes beyond AdamW's: whole runs on one worker and two, killed and resumed."""

import numpy as np
import pytest
import torch
from recipe_of_two import RECIPES, TwoSets, trial_of

from raysweep.results.filesystem import Storage
from raysweep.training.learner import Learner
from raysweep.training.loop import train
from raysweep.training.outcome import Silent
from raysweep.training.parallel import Workers

pytestmark = pytest.mark.slow


class Dies(Silent):
    def report(self, step: int, tokens: int, loss: float) -> None:
        if step == 12:
            raise KeyboardInterrupt


def losses(outcome) -> list[float]:
    assert outcome.loss_ema is not None
    return [outcome.loss, outcome.loss_ema, *outcome.named_losses["turned"]]


@pytest.mark.parametrize("name", list(RECIPES))
def test_killed_and_resumed_is_bit_identical(tmp_path, name):
    corpus = TwoSets()
    whole = train(trial_of(name), corpus)
    assert whole.status == "finished"
    assert whole.loss is not None
    assert whole.loss < 0.97 * whole.curve["train_loss"][0]
    with pytest.raises(KeyboardInterrupt):
        train(trial_of(name), corpus, reporter=Dies(), checkpoints=Storage.at(tmp_path))
    resumed = train(trial_of(name), corpus, checkpoints=Storage.at(tmp_path))
    assert losses(resumed) == losses(whole)
    assert resumed.curve == whole.curve


@pytest.fixture(scope="module")
def outcomes(of_two):
    return [found["recipe_of_two"] for found in of_two]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_two_workers_agree_with_one_and_resume(outcomes, strategy, name):
    corpus = TwoSets()
    one = train(trial_of(name), corpus)
    first, second = (o[strategy, name] for o in outcomes)
    assert losses(first) == losses(second)
    assert losses(first) == pytest.approx(losses(one), rel=2e-5)
    assert first.curve["grad_norm"] == pytest.approx(one.curve["grad_norm"], rel=1e-3)
    if strategy == "fsdp":
        resumed = outcomes[0][strategy, name, "resumed"]
        assert losses(resumed) == losses(first)
        assert resumed.curve == first.curve


def test_named_sets_have_losses_of_their_own():
    outcome = train(trial_of("muon"), TwoSets())
    assert outcome.named_losses["plain"] == (outcome.loss, outcome.loss_se)
    loss, error = outcome.named_losses["turned"]
    assert outcome.loss is not None
    assert loss > outcome.loss + 3 * error, "text read backwards does not follow the table"


def test_averaged_weights_are_the_mean_of_those_of_the_steps(corpus, spec):
    """By the plain formula, weights of each step kept."""
    trial = spec(recipe={"ema_tokens": 400.0})
    learner = Learner(trial, corpus, torch.device("cpu"), Workers())
    learner.build()
    seen = []
    for step in range(8):
        learner.learn(step, 0.01, want_trace=False)
        seen.append(learner.model.embedding.detach().clone())
    last = seen[-1].clone()
    shares = torch.tensor([np.exp(-128 * (7 - i) / 400) for i in range(8)], dtype=torch.float32)
    expected = (torch.stack(seen) * (shares / shares.sum())[:, None, None]).sum(0)
    assert learner.average is not None
    with learner.average.in_place():
        torch.testing.assert_close(learner.model.embedding.detach(), expected)
    assert torch.equal(learner.model.embedding, last)
    evaluated = learner.evaluate()
    assert evaluated.averaged is not None
    assert evaluated.averaged.loss != evaluated.main.loss
