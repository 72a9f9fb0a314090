"""The gradient noise scale against gradients of single sequences, one by one."""

import json

import numpy as np
import pytest
import torch

from raysweep.data.batches import train_batch
from raysweep.model import build
from raysweep.training.groups import groups_of
from raysweep.training.loop import train
from raysweep.training.noise_scale import NoiseScale, trace_of_pair, trace_of_workers
from raysweep.training.optimizer import FlatParameters
from raysweep.training.parallel import Workers
from raysweep.training.step import GradientAccumulator

BATCH, STEPS = 8, 300


@pytest.fixture(scope="module")
def measured(corpus, spec):
    """A gradient maker over an epoch's worth of sequences, and their true trace and |G|^2."""
    trial = spec(scale={"layers": 1})
    model = build(trial.cell.shape, trial.cell.settings, rope_base=1e4, seed=0)
    parameters = FlatParameters(model, groups_of(trial))
    maker = GradientAccumulator(
        model=model,
        parameters=parameters,
        tokens=corpus.train,
        workers=Workers(),
        device=torch.device("cpu"),
        seed=0,
        batch_sequences=BATCH,
        micro=BATCH,
    )
    gradients = []
    for sequence in range(STEPS * BATCH):
        inputs, targets = train_batch(
            corpus.train, seed=0, step=sequence, batch_sequences=1, sequence_length=16
        )
        parameters.zero()
        model(torch.from_numpy(inputs), torch.from_numpy(targets)).objective.backward()
        gradients.append(parameters.gradients()[0].numpy().copy())
    everything = np.array(gradients, dtype=np.float64)
    mean = everything.mean(0)
    trace = ((everything - mean) ** 2).sum() / (len(everything) - 1)
    return maker, trace, mean @ mean - trace / len(everything)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [BATCH, 2], ids=["halves of a batch", "micro-batches"])
def test_within_five_per_cent_of_single_sequences(measured, micro):
    maker, trace, grad_sq = measured
    maker.micro = micro
    noise = NoiseScale(steps=1, batch_sequences=BATCH)
    for step in range(STEPS):
        batch = maker(step, want_trace=True)
        assert batch.trace is not None
        noise.add_step(step, 0.0, batch.numbers[1].item())
        noise.add_trace(step, batch.trace.item())
    assert noise.trace == pytest.approx(trace, rel=0.05)
    assert noise.grad_sq == pytest.approx(grad_sq, rel=0.05)
    assert noise.sequences == pytest.approx(trace / grad_sq, rel=0.05)


def test_measuring_leaves_the_gradient_alone(measured):
    maker, _, _ = measured
    maker.micro = BATCH
    plain = maker(3, want_trace=False)
    gradient = maker.parameters.gradients()[0].clone()
    measured_too = maker(3, want_trace=True)
    assert plain.trace is None
    torch.testing.assert_close(maker.parameters.gradients()[0], gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(measured_too.numbers, plain.numbers)


def test_estimators_on_known_noise():
    """|g|^2 of means of b draws from N(mu, 1) in many dimensions."""
    rng = np.random.default_rng(0)
    mu = rng.normal(size=40_000) / 10
    workers = [mu + rng.normal(size=mu.size) / np.sqrt(3) for _ in range(4)]
    apart = workers[0] - workers[1]
    assert trace_of_pair(apart @ apart, 3) == pytest.approx(mu.size, rel=0.03)
    whole = np.mean(workers, axis=0)
    mean_sq = float(np.mean([w @ w for w in workers]))
    assert trace_of_workers(mean_sq, whole @ whole, 3, 4) == pytest.approx(mu.size, rel=0.03)


def test_lost_in_the_noise_is_none():
    noise = NoiseScale(steps=10, batch_sequences=4)
    assert noise.sequences is None
    noise.add_step(9, 2.0, 1.0)
    noise.add_trace(9, 8.0)
    assert noise.grad_sq == -1.0
    assert noise.sequences is None


def test_not_every_step_and_half_as_often_at_first():
    noise = NoiseScale(steps=1000, batch_sequences=4)
    wanted = [step for step in range(1000) if noise.wants_pair(step)]
    late = [step for step in wanted if step >= 500]
    assert 55 <= len(late) <= 65
    assert 27 <= len(wanted) - len(late) <= 33


def test_quarters_are_told_apart_and_the_first_half_is_in_them_alone():
    """The noise scale is the second half's; each quarter has its own loss, |G|^2 and tr S."""
    noise = NoiseScale(steps=8, batch_sequences=4)
    assert noise.along is None
    for step in range(8):
        quarter = step // 2
        noise.add_step(step, 4.0 - quarter, 10.0 + quarter)
        noise.add_trace(step, 4.0 * (quarter + 1))
    assert (noise.trace, noise.norm_count) == (14.0, 4)
    along = json.loads(noise.along or "")
    assert [q["loss"] for q in along] == [4.0, 3.0, 2.0, 1.0]
    assert [q["trace"] for q in along] == [4.0, 8.0, 12.0, 16.0]
    assert [q["grad_sq"] for q in along] == [9.0, 9.0, 9.0, 9.0]
    short = NoiseScale(steps=3, batch_sequences=4)
    assert any(short.wants_pair(step) for step in range(3))


def test_recorded_by_runs_if_asked(corpus, spec):
    outcome = train(spec(), corpus)
    assert outcome.noise_trace is not None
    assert outcome.noise_grad_sq is not None
    if outcome.noise_scale_tokens is not None:
        ratio = outcome.noise_trace / outcome.noise_grad_sq
        assert outcome.noise_scale_tokens == pytest.approx(16 * ratio)
    quarters = json.loads(outcome.noise_quarters or "[]")
    assert len(quarters) == 4
    assert quarters[0]["loss"] > quarters[3]["loss"]
    off = train(spec(recipe={"noise_scale": False}), corpus)
    assert off.noise_quarters is None
    assert off.noise_trace is None
    assert off.loss == pytest.approx(outcome.loss, rel=1e-4)
    single = train(spec(batch_sequences=1, tokens=16 * 20), corpus)
    assert single.noise_trace is None
