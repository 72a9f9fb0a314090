"""Runs that are killed with SIGKILL again and again, started as a script by test_checkpoint.py.

Each attempt is a fork of this process, which has imported all but computed nothing.
"""

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import toys

from raysweep.results.filesystem import Storage
from raysweep.training import loop
from raysweep.training.outcome import Silent
from raysweep.training.parallel import Workers
from raysweep.training.runtime import clean_slate

KILLS = 3


class SaysFirst(Silent):
    """Writes the first step of an attempt into a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.said = pipe, False

    def report(self, step: int, tokens: int, loss: float) -> None:
        if not self.said:
            os.write(self.pipe, f"{step}\n".encode())
            self.said = True


def attempt(architecture: str, folder: Path, pipe: int) -> None:
    trial = toys.make_spec(
        architecture,
        tokens=16 * 8 * 150,
        recipe={"checkpoint_seconds": 1e-9},
        moe={"balance": "bias"},
    )
    device, storage = torch.device("cpu"), Storage.at(folder)
    with clean_slate(device, 1, trial.seed):
        run = loop._Run(trial, toys.ToyCorpus(), device, Workers(), SaysFirst(pipe), storage)
        outcome = dataclasses.asdict(run.to_the_end())
    for name in ("seconds_train", "tokens_per_second", "peak_memory_bytes"):
        del outcome[name]
    learned = torch.cat([p.detach().flatten() for p in run.learner.model.parameters()])
    outcome["weights"] = hashlib.sha256(learned.numpy().tobytes()).hexdigest()
    outcome["bias"] = run.learner.model.expert_bias.tolist()
    (folder / "outcome.json").write_text(json.dumps(outcome))


def start(architecture: str, folder: Path) -> tuple[int, int]:
    """Fork an attempt; its process id and first step, once that is done."""
    folder.mkdir(exist_ok=True)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            attempt(architecture, folder, writer)
        finally:
            os._exit(0 if (folder / "outcome.json").exists() else 1)
    os.close(writer)
    with os.fdopen(reader) as lines:
        return pid, int(lines.readline())


def main(folder: Path) -> None:
    rng = random.Random(3)
    said = {}
    for architecture in ("dense", "moe"):
        quiet, _ = start(architecture, folder / f"{architecture}-quiet")
        assert os.waitpid(quiet, 0)[1] == 0
        killed = folder / f"{architecture}-killed"
        firsts = []
        for _ in range(KILLS):
            pid, first = start(architecture, killed)
            firsts.append(first)
            time.sleep(rng.uniform(0.01, 0.1))
            os.kill(pid, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        pid, first = start(architecture, killed)
        assert os.waitpid(pid, 0)[1] == 0
        said[architecture] = [*firsts, first]
    (folder / "firsts.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
