"""What training is for: experts that pay, loads that even out, losses that can be compared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysweep.data.batches import validation_batches
from raysweep.model import Decoder
from raysweep.training import loop
from raysweep.training.horizon_metrics import HorizonMetrics
from raysweep.training.loop import train
from raysweep.training.outcome import Silent
from raysweep.training.parallel import Workers

SCRIPT = Path(__file__).with_name("short_of_memory.py")


class TableCorpus:
    """Each token follows from the two before by a table of random entries: much to remember."""

    bytes_per_token = 1.0
    vocab_size = 32

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        table = rng.integers(0, 32, (32, 32))
        tokens = np.empty(200_000, dtype=np.uint16)
        a = b = 0
        for i, noise in enumerate(rng.random(len(tokens)) < 0.1):
            a, b = b, int(rng.integers(32)) if noise else int(table[a, b])
            tokens[i] = b
        self.train, self.validation = tokens[:-4000], tokens[-4000:]


@pytest.mark.slow
def test_experts_beat_the_dense_twin_at_equal_tokens(spec):
    """Equal active parameters in the experts, equal data, learning rate and batch."""
    corpus: Any = TableCorpus()
    common = {"tokens": 16 * 32 * 400, "batch_sequences": 32, "learning_rate": 0.01}
    dense = spec("dense", **common)
    moe = spec("moe", moe={"experts": 16, "top_k": 2}, **common)
    assert moe.cell.counts.params_active_non_embedding == pytest.approx(
        dense.cell.counts.params_active_non_embedding, rel=0.15
    )
    of_dense, of_moe = train(dense, corpus), train(moe, corpus)
    assert of_moe.loss is not None
    assert of_dense.loss is not None
    assert of_moe.loss < 0.96 * of_dense.loss  # the same slice for both, so paired
    assert of_moe.train_loss is not None
    assert of_dense.train_loss is not None
    assert of_moe.train_loss < 0.95 * of_dense.train_loss


def trained(trial, corpus) -> tuple[loop._Run, dict[str, float]]:
    run = loop._Run(trial, corpus, torch.device("cpu"), Workers(), Silent(), None)
    outcome = run.to_the_end()
    assert outcome.expert_load_entropy is not None
    assert outcome.expert_load_max_over_mean is not None
    assert outcome.loss is not None
    return run, {
        "entropy": outcome.expert_load_entropy,
        "busiest": outcome.expert_load_max_over_mean,
        "loss": outcome.loss,
    }


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"balance": "loss"}, {"balance": "bias"}])
def test_loads_even_out(corpus, spec, settings):
    common = {"experts": 8, "top_k": 1, "router_z_loss": 0.0}
    changes = {"tokens": 16 * 8 * 300, "learning_rate": 0.02}
    _, free = trained(spec("moe", moe=common | {"balance": "none"}, **changes), corpus)
    _, even = trained(spec("moe", moe=common | settings, **changes), corpus)
    assert even["entropy"] > free["entropy"]
    assert even["busiest"] < 0.8 * free["busiest"]
    assert even["loss"] < 1.05 * free["loss"]


def test_router_z_loss_keeps_the_routers_normaliser_small(corpus, spec):
    def normaliser(weight: float) -> float:
        run, _ = trained(spec("moe", moe={"router_z_loss": weight}), corpus)
        inputs, _ = next(
            validation_batches(
                corpus.validation, sequences=16, sequence_length=16, batch_sequences=16
            )
        )
        seen = []
        layer = run.learner.model.feed_forward[-1]
        norm, router = layer.get_parameter("norm"), layer.get_parameter("router.weight")
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        with torch.no_grad():
            run.learner.model._stack(torch.from_numpy(inputs))
            unit = torch.nn.functional.rms_norm(seen[0], seen[0].shape[-1:], norm)
            return (unit @ router).logsumexp(-1).square().mean().item()

    assert normaliser(0.1) < 0.5 * normaliser(0.0)


def test_all_trials_are_measured_on_the_same_sequences(corpus, spec, monkeypatch):
    seen: list[torch.Tensor] = []
    evaluate = Decoder.evaluate

    def noting(self, tokens, targets, count):
        seen.append(torch.cat([tokens, targets[:, -1:]], 1)[:count])
        return evaluate(self, tokens, targets, count)

    monkeypatch.setattr(Decoder, "evaluate", noting)
    slices = []
    for changes in ({}, {"seed": 3, "batch_sequences": 2}, {"scale": {"layers": 1}}):
        seen.clear()
        train(spec(tokens=16 * 8 * 4, **changes), corpus)
        slices.append(torch.cat(seen))
    assert slices[0].shape == (33, 17)
    assert torch.equal(slices[0], slices[1])
    assert torch.equal(slices[0], slices[2])


def test_standard_error_is_that_of_a_bootstrap(corpus, spec):
    trial = spec()
    run = loop._Run(trial, corpus, torch.device("cpu"), Workers(), Silent(), None)
    outcome = run.to_the_end()
    inputs, targets = next(
        validation_batches(corpus.validation, sequences=33, sequence_length=16, batch_sequences=33)
    )
    model = run.learner.model
    losses = model.evaluate(torch.from_numpy(inputs), torch.from_numpy(targets))[0].numpy()
    draws = np.random.default_rng(0).choice(losses, (20_000, len(losses)))
    assert outcome.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert outcome.loss_se == pytest.approx(draws.mean(1).std(), rel=0.05)


@pytest.mark.parametrize("fault_at", [37, 300])
def test_divergence_is_seen_within_a_hundredth_of_the_run(corpus, spec, monkeypatch, fault_at):
    trial = spec(tokens=16 * 8 * 400, recipe={"clip_norm": None})
    sound = HorizonMetrics.rate

    def faulty(self, step):
        return sound(self, step) * (1e5 if step >= fault_at else 1)

    monkeypatch.setattr(HorizonMetrics, "rate", faulty)
    outcome = train(trial, corpus)
    assert outcome.status == "diverged"
    assert fault_at < outcome.step <= fault_at + 1 + trial.steps // 100
    assert outcome.reason is not None
    assert f"at step {outcome.step}" in outcome.reason


class Threads(Silent):
    def __init__(self) -> None:
        self.seen: set[int] = set()

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.seen.add(torch.get_num_threads())


def test_a_trial_computes_on_the_threads_it_was_given(corpus, spec):
    torch.set_num_threads(2)
    threads = Threads()
    train(spec(tokens=16 * 8 * 3), corpus, reporter=threads, threads=1)
    assert threads.seen == {1}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space")
def test_real_lack_of_memory_halves_the_micro_batch(repo):
    """A process that may grow by less than its batch takes, or than its model, and one that may."""
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    free, limited, huge = (line.split() for line in done.stdout.splitlines()[-3:])
    assert huge == ["out_of_memory", "None", "None", "None"]
    assert free[:3] == ["finished", "128", "8"]
    status, micro, accumulation = limited[:3]
    assert status == "finished"
    assert int(micro) < 1024
    assert int(micro) * int(accumulation) == 1024
    assert float(limited[3]) == pytest.approx(float(free[3]), rel=1e-5)
