"""WSD branches: one run gives what separate runs of its horizons give."""

import dataclasses
from typing import Any

import pytest
import torch

from raysweep.errors import UserError
from raysweep.model import Decoder
from raysweep.results.filesystem import Storage
from raysweep.training.checkpoint import Checkpoints
from raysweep.training.horizon_metrics import HorizonMetrics
from raysweep.training.loop import train
from raysweep.training.outcome import Silent, TrialOutcome

LENGTHS = (40, 64, 120)
RECIPE = {"schedule": "wsd", "warmup_tokens": 16 * 8 * 5, "branches": True, "noise_scale": False}


def of_steps(spec, steps: int, architecture: str = "moe", **recipe):
    return spec(
        architecture,
        tokens=16 * 8 * steps,
        recipe=RECIPE | recipe,
        moe={"balance": "bias"},
    )


def result(outcome: TrialOutcome) -> dict[str, object]:
    """All but times, memory, and what was lent."""
    kept = dataclasses.asdict(outcome)
    for name in ("seconds_train", "tokens_per_second", "peak_memory_bytes", "tokens_trained"):
        del kept[name]
    return kept


def branched(spec, corpus, architecture: str = "moe", skip=(), **options):
    """The outcomes by steps of one run with its branches, and their order."""
    recipe = options.pop("recipe", {})
    trials = [of_steps(spec, n, architecture, **recipe) for n in LENGTHS]
    found: dict[int, TrialOutcome] = {}

    def on_branch(trial, outcome):
        assert trial.steps not in found
        found[trial.steps] = outcome

    waiting = [t for t in trials[:-1] if t.steps not in skip]
    found[LENGTHS[-1]] = train(trials[-1], corpus, branches=waiting, on_branch=on_branch, **options)
    return found


@pytest.fixture(scope="module")
def whole(corpus, spec):
    return branched(spec, corpus)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [("dense", {}), ("moe", {"optimizer": "muon", "ema_tokens": 2000, "decay_shape": "1-sqrt"})],
)
def test_each_branch_equals_a_run_of_its_own(corpus, spec, architecture, recipe):
    found = branched(spec, corpus, architecture, recipe=recipe)
    assert list(found) == list(LENGTHS)
    for steps, outcome in found.items():
        alone = train(of_steps(spec, steps, architecture, **recipe), corpus)
        assert result(outcome) == result(alone)
        assert outcome.tokens_seen == 16 * 8 * steps
    own = [found[n].tokens_trained / (16 * 8) for n in LENGTHS]
    assert own == [8, 13, 120]  # a fifth of each, and all of the longest


@pytest.mark.slow
def test_with_the_noise_scale_measured_it_equals_within_rounding(corpus, spec):
    found = branched(spec, corpus, recipe={"noise_scale": True})
    for steps, outcome in found.items():
        alone = train(of_steps(spec, steps, noise_scale=True), corpus)
        assert outcome.loss == pytest.approx(alone.loss, rel=1e-5)
        assert outcome.noise_trace == pytest.approx(alone.noise_trace, rel=1e-3)
        assert outcome.noise_grad_sq == pytest.approx(alone.noise_grad_sq, rel=1e-3)


class DiesAfter(Silent):
    """Is killed after some calls."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("reports", [20, 37, 70])
def test_killed_anywhere_and_resumed(corpus, spec, whole, tmp_path, monkeypatch, reports):
    """On the shared phase, in a branch, after one: rows that stand are not made again."""
    recipe: dict[str, Any] = {"checkpoint_seconds": 1e-9}
    storage = Storage.at(tmp_path)
    monkeypatch.setattr(Checkpoints, "writing", False)  # a checkpoint after every step
    trials = [of_steps(spec, n, **recipe) for n in LENGTHS]
    found: dict[int, TrialOutcome] = {}

    def on_branch(trial, outcome):
        assert trial.steps not in found
        found[trial.steps] = outcome

    def attempt(reporter):
        waiting = [t for t in trials[:-1] if t.steps not in found]
        return train(
            trials[-1],
            corpus,
            branches=waiting,
            on_branch=on_branch,
            reporter=reporter,
            checkpoints=storage,
        )

    with pytest.raises(KeyboardInterrupt):
        attempt(DiesAfter(reports))
    late = DiesAfter(1000)
    found[LENGTHS[-1]] = attempt(late)
    assert {n: result(o) for n, o in found.items()} == {n: result(o) for n, o in whole.items()}
    everything = sum(o.tokens_trained for o in whole.values()) / (16 * 8)
    assert 1000 - late.left == everything - (reports - 1)
    assert sum(o.tokens_trained for o in found.values()) / (16 * 8) == everything


@pytest.mark.slow
def test_a_branch_whose_row_stands_is_left_for_the_run(corpus, spec, whole, tmp_path, monkeypatch):
    """Killed between the row of a branch and the next checkpoint."""
    monkeypatch.setattr(Checkpoints, "writing", False)
    recipe: dict[str, Any] = {"checkpoint_seconds": 1e-9}
    storage = Storage.at(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        branched(spec, corpus, recipe=recipe, checkpoints=storage, reporter=DiesAfter(37))
    found = branched(spec, corpus, recipe=recipe, checkpoints=storage, skip=(40,))
    assert list(found) == [64, 120]
    assert all(result(found[n]) == result(whole[n]) for n in found)


def test_what_ends_the_shared_phase_ends_all_horizons(corpus, spec, monkeypatch):
    sound = HorizonMetrics.rate

    def faulty(self, step):
        return sound(self, step) * (1e5 if step >= 45 else 1)

    monkeypatch.setattr(HorizonMetrics, "rate", faulty)
    found = branched(spec, corpus, recipe={"clip_norm": None})
    assert {n: o.status for n, o in found.items()} == {
        40: "finished", 64: "diverged", 120: "diverged"
    }  # fmt: skip
    assert found[64].reason is not None
    assert 45 < found[64].step <= 50
    assert found[64].loss is None


def test_no_memory_in_a_branch_is_the_outcome_of_that_branch(corpus, spec, whole, monkeypatch):
    evaluate, calls = Decoder.evaluate, []

    def short_once(self, tokens, targets, count):
        calls.append(len(tokens))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return evaluate(self, tokens, targets, count)

    monkeypatch.setattr(Decoder, "evaluate", short_once)
    found = branched(spec, corpus)
    assert (found[40].status, found[40].step) == ("out_of_memory", 40)
    assert all(result(found[n]) == result(whole[n]) for n in (64, 120))


@pytest.mark.parametrize(
    ("recipe", "text"),
    [({"schedule": "cosine"}, "need schedule: wsd"), ({"warmup_tokens": None}, "need warmup_t")],
)
def test_recipes_that_cannot_branch_are_refused(spec, recipe, text):
    with pytest.raises((UserError, ValueError), match=text):
        of_steps(spec, 40, **recipe)
