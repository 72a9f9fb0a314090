"""A run with all the memory it wants, then one with too little, then one whose model alone is too
large; started by test_quality.py."""

import resource
from pathlib import Path

import toys

from raysweep.training.loop import train

ROOM = 60 << 20
"""Bytes that the process may grow by: less than the whole batch takes, more than a sequence."""


def main() -> None:
    # Memory that a run leaves is kept for the next, so the first one may only need little.
    small, trial = (
        toys.make_spec(
            batch_sequences=1024,
            tokens=16 * 1024 * 2,
            resources={"micro_batch_sequences": micro},
            scale={"d_model": 64, "layers": 2, "heads": 2},
        )
        for micro in (128, 1024)
    )
    corpus = toys.ToyCorpus()
    outcomes = [train(small, corpus)]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    outcomes.append(train(trial, corpus))
    huge = toys.make_spec(scale={"d_model": 1024, "layers": 4, "heads": 2})
    outcomes.append(train(huge, corpus))
    for outcome in outcomes:
        parts = outcome.status, outcome.micro_batch_sequences, outcome.accumulation, outcome.loss
        print(*parts)


if __name__ == "__main__":
    main()
