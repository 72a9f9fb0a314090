"""Trials on several workers of a real local Ray, in a group that is kept."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysweep.data.corpus import prepare
from raysweep.data.shipping import upload
from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.study import Data
from raysweep.training.loop import train
from raysweep.training.outcome import Silent, WorkerOutOfMemory

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """The cache folder of the workers here: no other processes have it."""
    return str(tmp_path_factory.mktemp("node") / "cache")


@pytest.fixture(scope="module")
def _ray(repo, cache):
    import ray
    from ray._private.authentication_test_utils import reset_auth_token_state

    reset_auth_token_state()  # an earlier test may have used another token
    environment = {
        "PYTHONPATH": f"{repo}:{repo / 'tests' / 'training'}",
        "RAYSWEEP_CACHE": cache,
        "OMP_NUM_THREADS": "1",
    }
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small corpus of text, in the driver's cache."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"line {i} of many\n" for i in range(1000)))
    data = Data(source="text", paths=(str(folder / "text.txt"),), validation_sequences=33)
    return prepare(data, folder, cache=folder / "cache", sequence_length=16)


@pytest.fixture
def fitting(spec, text):
    """A trial of the corpus on two workers."""

    def make(**changes: Any):
        trial = spec(resources={"workers": 2}, **changes)
        shape = dataclasses.replace(trial.cell.shape, vocab_size=text.vocab_size)
        return dataclasses.replace(trial, cell=dataclasses.replace(trial.cell, model=shape))

    return make


def job(trial, corpus, storage: Storage, branches: Any = tuple, on_branch=None):
    from raysweep.training.ray_train import Job

    return Job(trial, corpus, storage, branches, on_branch)


class Heard(Silent):
    """Hears of progress; stops, raises or does something else once it has come so far."""

    def __init__(self, at: int = 1 << 30, then=lambda: None) -> None:
        self.steps: list[int] = []
        self.at, self.then, self.stop = at, then, False

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.steps.append(step)
        if step >= self.at:
            self.at = 1 << 30
            self.then()

    def should_stop(self) -> bool:
        return self.stop


@pytest.fixture
def pids_of(cache) -> Callable[[str], list[int]]:
    """Of the processes of an actor here, by its class."""

    def find(actor: str) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = cache.encode() in (folder / "environ").read_bytes()
                if ours and actor.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    return find


@pytest.fixture
def worker_pids(pids_of) -> Callable[[], list[int]]:
    """Of the processes of Ray Train's workers."""
    return lambda: pids_of("RayTrainWorker")


@pytest.fixture
def group(_ray, fitting, tmp_path) -> Iterator[Callable[[str], Any]]:
    """Hosts by name, each of a group of two; all end with the test, and give their room back."""
    import ray

    from raysweep.training.ray_train import end_groups, find_group

    hosts = []

    def find(name: str) -> Any:
        resources, notes = fitting().cell.resources, str(tmp_path / "ray")
        hosts.append(find_group(name, resources, strict=True, storage_path=notes))
        return hosts[-1]

    yield find
    end_groups(hosts, wait=True)
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2


def test_a_group_lives_through_trials_of_every_end(
    text, fitting, group, worker_pids, pids_of, tmp_path
):
    """One group: trials finish, diverge, are refused, stopped, lose a worker, and follow on."""
    from raysweep.training.ray_train import train_in_group

    results = Storage.at(tmp_path / "results")
    upload(text, results)
    elsewhere = dataclasses.replace(text, path=tmp_path / "only where the driver is")
    first = fitting()
    host = group("kept")
    heard = Heard()
    outcome = train_in_group(host, job(first, elsewhere, results), heard)
    one = train(dataclasses.replace(first, seed=0), text)
    assert (outcome.status, outcome.world_size) == ("finished", 2)
    assert outcome.loss == pytest.approx(one.loss, rel=1e-5)
    assert heard.steps == sorted(heard.steps)
    assert heard.steps[-1] == first.steps
    pids = sorted(worker_pids())
    assert len(pids) == 2
    # What starts the workers need not import PyTorch first: on a cold node that takes many seconds.
    with_torch = {
        actor: [b"libtorch" in Path(f"/proc/{pid}/maps").read_bytes() for pid in pids_of(actor)]
        for actor in ("GroupHost", "TrainController", "RayTrainWorker")
    }
    assert with_torch == {
        "GroupHost": [False],
        "TrainController": [False],
        "RayTrainWorker": [True, True],
    }
    # Else Ray has moved what `_Trainer` leaves out: each takes seconds to start, or to end.
    for needless in ("PlacementGroupCleaner", "DatasetManager", "AutoscalingCoordinator"):
        assert not pids_of(needless), needless

    sharded = fitting(seed=1)
    resources = sharded.cell.resources.model_copy(update={"strategy": "fsdp"})
    sharded = dataclasses.replace(
        sharded, cell=dataclasses.replace(sharded.cell, resources=resources)
    )
    assert train_in_group(host, job(sharded, elsewhere, results), Heard()).status == "finished"
    wild = fitting(
        learning_rate=50.0, recipe={"clip_norm": None, "eps": 1e-30}, tokens=16 * 8 * 400
    )
    assert train_in_group(host, job(wild, elsewhere, results), Heard()).status == "diverged"
    assert sorted(worker_pids()) == pids, "none began anew"

    # A worker is killed: the trial goes on from its checkpoint.
    long = fitting(seed=2, tokens=16 * 8 * 600, recipe={"checkpoint_seconds": 0.1})
    lost = Heard(at=300, then=lambda: os.kill(pids[1], signal.SIGKILL))
    outcome = train_in_group(host, job(long, elsewhere, results), lost)
    assert outcome.status == "finished"
    again = [b for a, b in zip(lost.steps, lost.steps[1:], strict=False) if b < a]
    assert all(step > 50 for step in again), "from a checkpoint, not from the start"
    other = Storage.at(tmp_path / "other")
    upload(text, other)
    assert outcome.loss == train_in_group(host, job(long, elsewhere, other), Heard()).loss
    assert not set(worker_pids()) & {pids[1]}

    # What a user must mend ends a trial at once, with its reason.
    refused = dataclasses.replace(fitting(), batch_sequences=7)
    with pytest.raises(UserError, match="7 sequences does not divide by 2 workers"):
        train_in_group(host, job(refused, elsewhere, results), Heard())

    # Asked to stop, a trial leaves a checkpoint, and the next attempt goes on from there.
    stopping = Heard(at=300, then=lambda: setattr(stopping, "stop", True))
    trial = fitting(seed=3, tokens=16 * 8 * 20_000, recipe={"checkpoint_seconds": 600})
    assert train_in_group(host, job(trial, elsewhere, results), stopping).status == "stopped"
    assert results.list("checkpoints", trial.key)

    # Early stopping raises in the reporter: the group is free again.
    def ends():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_group(host, job(dataclasses.replace(trial, seed=4), elsewhere, results),
                       Heard(at=300, then=ends))  # fmt: skip
    follows = train_in_group(host, job(fitting(seed=5), elsewhere, results), Heard())
    assert follows.status == "finished"


def test_an_error_of_its_own_is_tried_three_times(text, fitting, group, tmp_path):
    from raysweep.training.ray_train import train_in_group

    results = Storage.at(tmp_path / "results")
    upload(text, results)
    trial = fitting(seed=9)
    host = group("errs")
    folder = tmp_path / "starts"
    folder.mkdir()

    def broken():
        (folder / str(time.time_ns())).touch()
        raise RuntimeError("planted")

    with pytest.raises(UserError, match="planted"):
        train_in_group(host, job(trial, text, results, branches=broken), Heard())
    assert len(list(folder.iterdir())) <= 2 * 3, "by two workers, thrice"
    threading.Event().wait(0.1)
    good = train_in_group(host, job(trial, text, results), Heard())
    assert good.status == "finished"


def test_lack_of_memory_ends_the_trial_and_not_the_group(text, fitting, group, tmp_path):
    """The trial's weights are larger than any machine's address space: nothing is touched."""
    from raysweep.training.ray_train import train_in_group

    results = Storage.at(tmp_path / "results")
    upload(text, results)
    host = group("short")
    large = fitting(scale={"d_model": 983_040, "layers": 4, "heads": 15_360})
    with pytest.raises(WorkerOutOfMemory, match=r"worker \d is out of memory"):
        train_in_group(host, job(large, text, results), Heard())
    assert train_in_group(host, job(fitting(seed=10), text, results), Heard()).status == "finished"


def test_a_group_that_does_not_start_ends_its_trial_with_the_reason(text, fitting, group, tmp_path):
    """Then it tries again for the next one."""
    from raysweep.training.ray_train import train_in_group

    results = Storage.at(tmp_path / "results")
    upload(text, results)
    notes = tmp_path / "ray"
    notes.write_text("no folder")
    host = group("starts")
    with pytest.raises(UserError, match=r"its group does not start: .*ray"):
        train_in_group(host, job(fitting(seed=7), text, results), Heard())
    notes.unlink()
    assert train_in_group(host, job(fitting(seed=8), text, results), Heard()).status == "finished"


def test_a_group_whose_node_is_about_to_go_begins_anew_where_it_was(
    text, fitting, group, worker_pids, tmp_path
):
    """No checkpoint was due."""
    from raysweep.training.ray_train import train_in_group

    results = Storage.at(tmp_path / "results")
    upload(text, results)
    trial = fitting(seed=6, tokens=16 * 8 * 1000, recipe={"checkpoint_seconds": 600})
    host = group("moves")
    before: list[int] = []

    def leave() -> None:
        before.extend(worker_pids())
        host.leave.remote()

    heard = Heard(at=300, then=leave)
    assert train_in_group(host, job(trial, text, results), heard).status == "finished"
    assert len(before) == 2
    assert not set(worker_pids()) & set(before)
    assert heard.steps == sorted(heard.steps), "nothing was trained twice"
