"""Two workers agree with one, replicated (DDP) and sharded (FSDP2), also after a kill."""

import pytest

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.training.loop import train
from raysweep.training.outcome import Silent
from raysweep.training.parallel import Workers

pytestmark = pytest.mark.slow


class Heard(Silent):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.steps.append(step)


SHORT = 16 * 8 * 12


@pytest.fixture(scope="module")
def outcomes(of_two):
    """What each of two workers said of the same trials."""
    return [found["one_of_two"] for found in of_two]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_two_workers_agree_with_one(outcomes, corpus, spec, strategy, architecture):
    one = train(spec(architecture, tokens=SHORT), corpus)
    first, second = (o[strategy, architecture] for o in outcomes)
    assert first.world_size == 2
    assert (first.micro_batch_sequences, first.accumulation) == (4, 1)
    assert first.loss == second.loss
    assert first.loss == pytest.approx(one.loss, rel=1e-5)
    assert first.loss_se == pytest.approx(one.loss_se, rel=1e-4)
    assert first.curve["grad_norm"] == pytest.approx(one.curve["grad_norm"], rel=1e-3)
    if architecture == "moe":
        assert first.expert_load_entropy == pytest.approx(one.expert_load_entropy, rel=1e-3)
    assert first.noise_trace == pytest.approx(one.noise_trace, rel=0.5)
    assert first.peak_memory_bytes == second.peak_memory_bytes, "the most of either"
    parts, others = (o[strategy, architecture, "accumulated"] for o in outcomes)
    assert (parts.micro_batch_sequences, parts.accumulation) == (1, 4)
    assert others.micro_batch_sequences == (2 if strategy == "ddp" else 1)
    assert parts.loss == pytest.approx(one.loss, rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_lost_workers_resume(outcomes, strategy, architecture):
    for of_rank in outcomes:
        whole = of_rank[strategy, architecture]
        resumed = of_rank[strategy, architecture, "resumed"]
        assert resumed.loss == whole.loss
        assert resumed.curve == whole.curve


def test_killed_as_it_stops_a_run_keeps_the_checkpoint_that_was_being_written(outcomes):
    assert all(found["stopped"] for found in outcomes)


def test_what_a_sharded_model_has_learned_is_never_sent_whole(outcomes, spec):
    sent = outcomes[0]["sent"]
    assert max(sent) > 500, "runs resumed"
    assert max(sent) < 4 * spec().cell.counts.params_total


def test_another_number_of_workers_and_strategy_goes_on(outcomes, corpus, spec, folder_of_two):
    for of_rank in outcomes:
        assert of_rank["from ddp to fsdp"].loss == pytest.approx(
            outcomes[0]["ddp", "dense"].loss, rel=1e-5
        )
    for strategy in ("ddp", "fsdp"):
        trial = spec("moe", tokens=SHORT, recipe={"checkpoint_seconds": 1e-9})
        heard = Heard()
        states = Storage.at(folder_of_two / f"{strategy}-moe")
        one = train(trial, corpus, checkpoints=states, reporter=heard)
        assert heard.steps[0] > 3, "where the two were killed, or had ended"
        assert one.loss == pytest.approx(outcomes[0][strategy, "moe"].loss, rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_branches_of_two_workers_agree_with_runs_of_one(outcomes, corpus, spec, strategy):
    recipe = {"schedule": "wsd", "warmup_tokens": 256, "branches": True}
    for name, steps in (("branch", 6), ("longest", 12)):
        one = train(spec("moe", tokens=16 * 8 * steps, recipe=recipe), corpus)
        assert outcomes[0][strategy, name].loss == pytest.approx(one.loss, rel=1e-5)
    assert (strategy, "branch") not in outcomes[1], "only the first worker tells"


def test_noise_from_workers_that_cannot_split_their_part(outcomes):
    assert outcomes[0]["ddp", "one sequence each"].noise_trace > 0
    assert outcomes[0]["fsdp", "one sequence each"].noise_trace is None


@pytest.mark.parametrize(
    ("strategy", "mend"),
    [("ddp", "resources.strategy to fsdp"), ("fsdp", "resources.micro_batch_sequences to 2")],
)
def test_workers_out_of_memory_say_what_to_set(outcomes, strategy, mend):
    for rank in range(2):
        message = outcomes[rank][strategy, "out of memory"]
        assert message.startswith(f"worker {rank} is out of memory: set {mend}")


def test_a_batch_that_does_not_divide_is_refused(corpus, spec):
    with pytest.raises(UserError, match="8 sequences does not divide by 3 workers"):
        train(spec(), corpus, workers=Workers(0, 3))
