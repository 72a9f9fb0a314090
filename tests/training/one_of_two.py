"""What each of two workers runs for test_parallel.py: whole, killed and resumed, out of memory."""

import contextlib
import pickle
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist
import toys

from raysweep.errors import UserError
from raysweep.model import Decoder
from raysweep.results.filesystem import Storage
from raysweep.training.checkpoint import Checkpoints
from raysweep.training.loop import train
from raysweep.training.outcome import Silent
from raysweep.training.parallel import Workers


class Killed(Silent):
    """Dies after some steps, as all workers do when one is lost."""

    def report(self, step: int, tokens: int, loss: float) -> None:
        if step == 7:
            raise KeyboardInterrupt


class Stopped(Silent):
    """Wants to stop while the second checkpoint is being written; all die as the third is, before
    it counts."""

    def __init__(self) -> None:
        self.saves = 0

    def should_stop(self) -> bool:
        return self.saves == 2

    def save(self, checkpoints: Checkpoints, state: Any) -> None:
        self.saves += 1
        _save(checkpoints, state)
        if self.saves == 3:
            checkpoints.wait()
            raise KeyboardInterrupt

    def write(self, checkpoints: Checkpoints, *arguments: Any) -> None:
        if self.saves == 2:
            time.sleep(0.3)
        _write(checkpoints, *arguments)


_save, _write = Checkpoints.save, Checkpoints._write


def short_of_memory(*arguments: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")


def task(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    corpus = toys.ToyCorpus()
    outcomes, sent = {}, []
    from_leader = Workers.from_leader

    def noting(self: Workers, value: Any) -> Any:
        """What goes to all workers pickled: of a sharded model never what it has learned."""
        if self.sharded and self.rank == 0:
            sent.append(len(pickle.dumps(value)))
        return from_leader(self, value)

    with patch.object(Workers, "from_leader", noting):
        _run(corpus, rank, folder, outcomes)
    outcomes["sent"] = sent
    return outcomes


def _run(corpus: Any, rank: int, folder: Path, outcomes: dict[Any, Any]) -> None:
    for strategy in ("ddp", "fsdp"):
        workers = Workers.of_process_group(strategy)
        for architecture in ("dense", "moe"):
            trial = toys.make_spec(
                architecture, tokens=16 * 8 * 12, recipe={"checkpoint_seconds": 1e-9}
            )
            outcome = train(trial, corpus, workers=workers)
            outcomes[strategy, architecture] = outcome
            states = Storage.at(folder / f"{strategy}-{architecture}")
            options = {"workers": workers, "checkpoints": states}
            try:
                train(trial, corpus, reporter=Killed(), **options)
            except KeyboardInterrupt:
                dist.barrier()
            outcomes[strategy, architecture, "resumed"] = train(trial, corpus, **options)
            roomy = {"micro_batch_sequences": 1 + rank}  # as on GPUs of which one is half full
            accumulating = toys.make_spec(architecture, tokens=16 * 8 * 12, resources=roomy)
            outcomes[strategy, architecture, "accumulated"] = train(
                accumulating, corpus, workers=workers
            )
        recipe = {"schedule": "wsd", "warmup_tokens": 256, "branches": True}
        short, long = (
            toys.make_spec("moe", tokens=16 * 8 * steps, recipe=recipe) for steps in (6, 12)
        )
        outcomes[strategy, "longest"] = train(
            long,
            corpus,
            workers=workers,
            branches=[short],
            on_branch=lambda _, outcome, at=strategy: outcomes.update({(at, "branch"): outcome}),
        )
        single = toys.make_spec(batch_sequences=2, tokens=16 * 2 * 10)
        outcomes[strategy, "one sequence each"] = train(single, corpus, workers=workers)
        with patch.object(Decoder, "evaluate", short_of_memory):
            try:
                train(toys.make_spec(tokens=16 * 8), corpus, workers=workers)
            except UserError as error:
                outcomes[strategy, "out of memory"] = str(error)
    sharded = Workers.of_process_group("fsdp")
    outcomes["stopped"] = stopped_while_writing(sharded, Storage.at(folder / "stopped"))
    outcomes["from ddp to fsdp"] = train(
        toys.make_spec(tokens=16 * 8 * 12, recipe={"checkpoint_seconds": 1e-9}),
        corpus,
        workers=sharded,
        checkpoints=Storage.at(folder / "ddp-dense"),
    )


def stopped_while_writing(workers: Workers, states: Storage) -> int | None:
    """The step of the checkpoint that is left."""
    trial = toys.make_spec(tokens=16 * 8 * 400, recipe={"checkpoint_seconds": 1e-9})
    stopped = Stopped()
    patched = {
        "save": lambda checkpoints, state: stopped.save(checkpoints, state),
        "_write": lambda checkpoints, *arguments: stopped.write(checkpoints, *arguments),
    }
    with patch.multiple(Checkpoints, **patched), contextlib.suppress(KeyboardInterrupt):
        train(trial, toys.ToyCorpus(), workers=workers, checkpoints=states, reporter=stopped)
    dist.barrier()
    nothing = {"nothing": (0, torch.empty(0))}
    left = Checkpoints(states, trial.key, workers).load_on_all(nothing)
    return None if left is None else left["step"]
