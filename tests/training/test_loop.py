"""Whole runs: outcomes, exactness, divergence, memory, stopping and resuming."""

import copy
import dataclasses
import math

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from raysweep.errors import UserError
from raysweep.model import Decoder, compiled
from raysweep.results.filesystem import Storage
from raysweep.training import loop, monitor, noise_scale
from raysweep.training.checkpoint import Checkpoints
from raysweep.training.loop import train
from raysweep.training.optimizer import AdamW
from raysweep.training.outcome import Silent, TrialOutcome


def result(outcome: TrialOutcome) -> dict[str, object]:
    """All that must not vary: no times, no memory."""
    kept = dataclasses.asdict(outcome)
    for name in ("seconds_train", "tokens_per_second", "peak_memory_bytes"):
        del kept[name]
    return kept


@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_a_run_learns_and_says_all_about_itself(corpus, spec, architecture):
    trial = spec(architecture)
    outcome = train(trial, corpus)
    assert outcome.status == "finished"
    assert outcome.reason is None
    assert outcome.step == trial.steps == 40
    assert outcome.tokens_seen == trial.cell.tokens
    assert outcome.loss is not None
    assert outcome.train_loss is not None
    assert outcome.loss < 0.95 * outcome.curve["train_loss"][0]
    assert outcome.train_loss == pytest.approx(outcome.loss, rel=0.1)
    assert outcome.bits_per_byte == pytest.approx(outcome.loss / math.log(2))
    assert outcome.loss_se is not None
    assert 0 < outcome.loss_se < 0.2
    assert outcome.peak_memory_bytes > 10e6
    assert outcome.tokens_per_second > 0
    assert outcome.noise_trace is not None
    assert outcome.noise_trace > 0
    assert outcome.curve["step"] == list(range(1, 41))
    assert outcome.curve["tokens"][-1] == outcome.tokens_seen
    assert all(norm > 0 for norm in outcome.curve["grad_norm"])
    routed = (
        outcome.expert_load_entropy, outcome.expert_load_max_over_mean, outcome.router_confidence
    )  # fmt: skip
    if architecture == "dense":
        assert routed == (None, None, None)
    else:
        entropy, busiest, confidence = routed
        assert entropy is not None
        assert 0 < entropy <= 1
        assert busiest is not None
        assert 1 <= busiest <= 2
        assert confidence is not None
        assert 0.5 < confidence <= 1


@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_bit_identical_whatever_ran_before(corpus, spec, architecture):
    first = train(spec(architecture), corpus)
    train(spec("moe", seed=5, batch_sequences=4, tokens=16 * 8 * 5), corpus)
    torch.manual_seed(99)
    torch.randn(7)
    assert result(train(spec(architecture), corpus)) == result(first)
    assert result(train(spec(architecture, seed=1), corpus)) != result(first)


@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_accumulation_never_changes_the_result(corpus, spec, architecture):
    whole = train(spec(architecture), corpus)
    parts = train(spec(architecture, resources={"micro_batch_sequences": 2}), corpus)
    assert (whole.micro_batch_sequences, whole.accumulation) == (8, 1)
    assert (parts.micro_batch_sequences, parts.accumulation) == (2, 4)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.curve["grad_norm"] == pytest.approx(whole.curve["grad_norm"], rel=1e-3)


def test_global_state_is_put_back(corpus, spec):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    train(spec(tokens=16 * 8 * 2), corpus, threads=1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before[0])
    assert torch.get_float32_matmul_precision() == before[1]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [({"clip_norm": None, "eps": 1e-30}, "step"), ({"clip_norm": None, "init_std": 1e15}, "non-")],
)
def test_divergence_is_an_outcome(corpus, spec, recipe, reason):
    outcome = train(spec(recipe=recipe, learning_rate=50.0, tokens=16 * 8 * 400), corpus)
    assert outcome.status == "diverged"
    assert outcome.reason is not None
    assert reason in outcome.reason
    assert outcome.step < 200
    assert outcome.loss is None


def fail_above(monkeypatch, sequences: int, error: Exception | None = None) -> list[int]:
    """Make the model run out of memory on micro-batches of more than some sequences."""
    tried: list[int] = []
    forward = Decoder.forward

    def limited(self, tokens, targets):
        tried.append(len(tokens))
        if len(tokens) > sequences:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return forward(self, tokens, targets)

    monkeypatch.setattr(Decoder, "forward", limited)
    return tried


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(corpus, spec, monkeypatch):
    whole = train(spec("moe"), corpus)
    tried = fail_above(monkeypatch, 2)
    outcome = train(spec("moe"), corpus)
    assert tried[:3] == [8, 4, 2]
    assert (outcome.micro_batch_sequences, outcome.accumulation) == (2, 4)
    assert outcome.status == "finished"
    assert outcome.loss == pytest.approx(whole.loss, rel=1e-5)


def test_no_memory_at_all_is_an_outcome(corpus, spec, monkeypatch):
    fail_above(monkeypatch, 0, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"))
    outcome = train(spec(), corpus)
    assert outcome.status == "out_of_memory"
    assert outcome.reason == "no memory for one sequence at step 1"
    assert outcome.loss is None


@pytest.mark.parametrize(
    ("owner", "name", "steps"), [(AdamW, "step", 0), (Decoder, "evaluate", 40)]
)
def test_no_memory_beside_the_gradient_is_an_outcome(corpus, spec, monkeypatch, owner, name, steps):
    def fails(*arguments):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    monkeypatch.setattr(owner, name, fails)
    outcome = train(spec(), corpus)
    assert outcome.status == "out_of_memory"
    assert outcome.reason == f"no memory beside that for the gradient, after {steps} steps"
    assert (outcome.step, outcome.loss) == (steps, None)


def test_no_memory_for_the_noise_scale_costs_the_noise_scale(corpus, spec, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a gradient")

    unmeasured = train(spec(recipe={"noise_scale": False}), corpus)
    monkeypatch.setattr(noise_scale, "trace_of_pair", fails)
    outcome = train(spec(), corpus)
    assert outcome.noise_trace is None
    assert outcome.micro_batch_sequences == 8
    assert outcome.loss == unmeasured.loss


def test_other_errors_pass_through(corpus, spec, monkeypatch):
    fail_above(monkeypatch, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        train(spec(), corpus)


class Stopper(Silent):
    """Hears of progress and stops, or is killed, after some steps."""

    def __init__(self, stop_at: int | None = None, die_at: int | None = None) -> None:
        self.stop_at, self.die_at, self.heard = stop_at, die_at, []

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.heard.append((step, tokens, loss))
        if step == self.die_at:
            raise KeyboardInterrupt

    def should_stop(self) -> bool:
        return self.heard[-1][0] == self.stop_at


def test_the_reporter_hears_and_stops(corpus, spec):
    reporter = Stopper(stop_at=7)
    outcome = train(spec(), corpus, reporter=reporter)
    assert outcome.status == "stopped"
    assert outcome.reason == "stopped after 7 of 40 steps"
    assert (outcome.step, outcome.loss) == (7, None)
    assert [step for step, _, _ in reporter.heard] == list(range(1, 8))
    assert reporter.heard[-1][1] == 7 * 128
    assert reporter.heard[-1][2] < 4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("die_at", [1, 25])
def test_killed_and_resumed_is_bit_identical(corpus, spec, tmp_path, architecture, die_at):
    changes = {"moe": {"balance": "bias"}, "recipe": {"checkpoint_seconds": 1e-9}}
    trial = spec(architecture, **changes)
    whole = train(trial, corpus)
    with pytest.raises(KeyboardInterrupt):
        train(trial, corpus, reporter=Stopper(die_at=die_at + 1), checkpoints=Storage.at(tmp_path))
    state = Checkpoints(Storage.at(tmp_path), trial.key).load()
    assert state is not None
    assert 1 <= state["step"] <= die_at
    again = Stopper()
    resumed = train(trial, corpus, reporter=again, checkpoints=Storage.at(tmp_path))
    assert again.heard[0][0] == state["step"] + 1
    assert result(resumed) == result(whole)


class StopsWhenAsked(Silent):
    def __init__(self, at: int) -> None:
        self.asked, self.at = 0, at

    def should_stop(self) -> bool:
        self.asked += 1
        return self.asked == self.at


@pytest.mark.parametrize("stop_at", [3, 8, 19])
def test_stopped_between_points_of_the_curve_and_continued(
    corpus, spec, tmp_path, monkeypatch, stop_at
):
    monkeypatch.setattr(monitor, "POINTS", 5)  # a point each 8 of the 40 steps
    trial = spec("moe", recipe={"checkpoint_seconds": 600})
    whole = train(trial, corpus)
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0)
    stopped = train(
        trial, corpus, reporter=StopsWhenAsked(stop_at), checkpoints=Storage.at(tmp_path)
    )
    assert (stopped.status, stopped.step) == ("stopped", stop_at)
    state = Checkpoints(Storage.at(tmp_path), trial.key).load()
    assert state is not None
    assert len(state["pending"]) == stop_at % 8
    assert result(train(trial, corpus, checkpoints=Storage.at(tmp_path))) == result(whole)


def test_bad_resources_are_one_clear_line(corpus, spec):
    with pytest.raises(UserError, match="sees no GPU here: set it to 0"):
        train(spec(resources={"gpus_per_worker": 1}), corpus)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs compiled so far; a GPU's blocks are traced here, and run without Inductor."""
    seen: list[object] = []

    def counting(graph, example):
        seen.append(graph)
        return aot_eager(graph, example)

    monkeypatch.setattr(compiled, "BACKEND", counting)
    compiled.forget()
    yield seen
    compiled.forget()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_compiled_equals_eager_on_request(corpus, spec, graphs, architecture, precision):
    def run(compile: str):
        recipe = {"compile": compile, "precision": precision}
        return train(spec(architecture, scale={"layers": 1}, tokens=640, recipe=recipe), corpus)

    outcome = run("on")
    assert graphs
    count = len(graphs)
    assert outcome.loss == pytest.approx(
        run("off").loss, rel=1e-5 if precision == "float32" else 0.01
    )
    assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["loss", "bias"])
@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_trials_of_a_cell_share_their_graphs(corpus, spec, graphs, architecture, balance):
    """The first trial compiles each kind of block once for training and once for evaluation; those
    that follow nothing, whatever their batch, learning rate, seed, and noise scale."""
    counts = []
    routed = {"balance": balance, "shared_experts": 1}
    changes = {"moe": routed, "recipe": {"compile": "on", "precision": "bfloat16"}}
    for batch, seed in ((8, 0), (32, 1), (4, 2), (4, 3)):
        trial = spec(
            architecture,
            batch_sequences=batch,
            seed=seed,
            learning_rate=0.01 + seed / 100,
            tokens=16 * batch * 20,
            **copy.deepcopy(changes),
        )
        outcome = train(trial, corpus)
        assert outcome.noise_trace is not None
        assert outcome.micro_batch_sequences == 2
        counts.append(len(graphs))
    assert counts[0] == 2 * 3, "attention, feed-forward or experts, head; training and evaluation"
    assert counts[1:] == [counts[0]] * 3


@pytest.mark.slow
def test_more_cells_than_a_process_keeps_graphs_of(corpus, spec, graphs, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_KINDS", 2)
    counts = []
    for d_model in (16, 24, 32, 32, 16, 24):
        trial = spec(scale={"d_model": d_model, "layers": 1}, tokens=640, recipe={"compile": "on"})
        assert train(trial, corpus).status == "finished"
        counts.append(len(graphs))
    assert [b - a for a, b in zip([0, *counts], counts, strict=False)] == [6, 6, 6, 0, 6, 6]


@pytest.mark.slow
def test_bfloat16_autocast_takes_the_plain_path_and_learns(corpus, spec):
    full = train(spec("moe"), corpus)
    half = train(spec("moe", recipe={"precision": "bfloat16"}), corpus)
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss
