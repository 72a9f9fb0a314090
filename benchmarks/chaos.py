"""A study through everything that breaks: `python -m benchmarks.chaos --minutes 5 [--seed S]`.

A study of tiny trials (sampler `ladder`, checkpoints every second) runs on three Ray nodes of this
machine, through `raysweep run` in a process of its own. Those of two scales run on two workers, in
groups that are kept: on one node, and on two. Every 10 to 20 s something is killed with SIGKILL: a
process in which a trial runs; a worker of a group; the driver (then the same command again); a
whole node (then another joins); the head with the driver on it and all nodes (then a new cluster,
and the command again).
In the end no finished trial may be lost or run twice, every trial that was seen in flight must
have its row, every cell its trials, and no checkpoint be left. Some rows are made again by training
their trials without a kill: every column that measures neither time nor place is bit-equal; of
trials on two workers the loss is.
Every process counts the tokens that it trains, in a file that outlives it: what was trained beyond
what the rows needed was trained twice, and is told as seconds a start of a trial anew.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pandas as pd
from torch import distributed, multiprocessing

from benchmarks.entry import make_parser, save, start
from benchmarks.nodes import ONE_WORKER, TRAIN_WORKER, Cluster, Driver, at_each_step, in_trial
from raysweep.data.corpus import prepare
from raysweep.results.schema import row_table
from raysweep.study import Study
from raysweep.training.loop import train
from raysweep.training.parallel import Workers
from raysweep.training.single import train_one

MEASURED = (
    "started_at",
    "seconds_wall",
    "seconds_train",
    "tokens_per_second",
    "peak_memory_bytes",
    "worker",
    "device",
    "git_revision",
    "strategy",
)
"""Columns that say when, where and how fast; all others must be equal."""
PAUSES = (10.0, 20.0)
"""Shortest and longest time between two kills, seconds."""
ROUND = ("worker", "driver", "group", "node", "worker", "driver", "group", "node", "head")
"""What is killed in one round, in an order shuffled anew each time."""
CHECKPOINT_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""Besides, a checkpoint may take to be looked for and written on a busy machine."""
COUNTER = """
import mmap, os, struct

def after_step(learner, files={}):
    if learner.workers.rank == 0:
        key = learner.spec.key
        if key not in files:
            path = os.path.join(os.environ["COUNTS"], f"{key}.{os.getpid()}")
            with open(path, "wb+") as stream:
                stream.truncate(8)
                files[key] = mmap.mmap(stream.fileno(), 8)
        (before,) = struct.unpack("d", files[key])
        files[key][:] = struct.pack("d", before + learner.spec.batch_tokens)
"""
GIVE_UP_SECONDS = 3600.0
"""A study that is not done after this long never will be."""


def two(cpus: float) -> dict[str, Any]:
    """Resources of trials on two workers."""
    return {"workers": 2, "cpus_per_worker": cpus}


def search_space(minutes: float, seed: int) -> dict[str, Any]:
    """About as many trials as fit the time while something dies every 15 s."""
    return {
        "study": "chaos",
        "seed": seed,
        "architectures": {"dense": {}},
        "model": {"sequence_length": 32},
        "scales": [
            {"name": "a", "d_model": 8, "layers": 1, "heads": 1},
            {"name": "b", "d_model": 16, "layers": 1, "heads": 1},
            {"name": "c", "d_model": 24, "layers": 1, "heads": 1, "resources": two(0.5)},
            {"name": "d", "d_model": 32, "layers": 1, "heads": 1, "resources": two(1)},
        ],
        "horizons": [{"tokens": 150_000}, {"tokens": 300_000}],
        "search": {
            "strategy": "ladder",
            "trials_per_cell": max(2, round(minutes)),
            "extend_edges": False,
            "learning_rate": {"low": 1e-3, "high": 1e-1},
            "batch_sequences": {"low": 4, "high": 8},
        },
        "recipe": {"checkpoint_seconds": CHECKPOINT_SECONDS},
        "data": {"max_megabytes": 2, "validation_sequences": 64},
    }


class Chaos:
    """Kills one thing after another while a study runs."""

    def __init__(self, cluster: Cluster, driver: Driver, seed: int, seconds: float) -> None:
        self.injected: Counter[str] = Counter()
        self.hit_running = 0
        """Kills of workers, nodes and the head that ended at least one running trial."""
        self.seen: dict[str, pd.Timestamp] = {}
        """Finished trials seen before some kill, with the time of their start."""
        self.in_flight: set[str] = set()
        """Trials that had a checkpoint at some kill."""
        self._cluster, self._driver = cluster, driver
        self._random = random.Random(seed)
        self._queue: list[str] = []
        self._until = time.monotonic() + seconds
        self._next = time.monotonic() + self._pause()

    def tick(self) -> None:
        """Kill something if it is time."""
        now = time.monotonic()
        if now < self._next or now > self._until:
            return
        for row in self._driver.rows().query("status == 'finished'").itertuples():
            self.seen.setdefault(str(row.trial_key), row.started_at)  # pyright: ignore
        if not self._queue:
            self._queue = self._random.sample(ROUND, len(ROUND))
        self.in_flight |= {path.parent.name for path in self._driver.checkpoints()}
        kind = next((k for k in self._queue if getattr(self, f"_kill_{k}")()), None)
        if kind is None:
            return  # nothing of these kinds runs: soon again
        self._queue.remove(kind)
        self.injected[kind] += 1
        print(f"{now - self._until:+6.0f} s: {kind} killed, {len(self.seen)} finished before")
        self._next = time.monotonic() + self._pause()

    def _pause(self) -> float:
        return self._random.uniform(*PAUSES)

    def _kill_worker(self) -> bool:
        return self._kill_one(ONE_WORKER)

    def _kill_group(self) -> bool:
        return self._kill_one(TRAIN_WORKER)

    def _kill_one(self, name: str) -> bool:
        found = trial_pids(self._cluster, (name,))
        if not found:
            return False
        self.hit_running += 1
        os.kill(self._random.choice(found), SIGKILL)
        return True

    def _kill_driver(self) -> bool:
        self._driver.kill()
        self._driver.start()
        return True

    def _kill_node(self) -> bool:
        node = self._random.choice(self._cluster.workers)
        self.hit_running += any(pid in node.pids() for pid in trial_pids(self._cluster))
        self._cluster.kill(node)
        self._cluster.add_worker()
        return True

    def _kill_head(self) -> bool:
        self.hit_running += bool(trial_pids(self._cluster))
        for node in (self._cluster.head, *self._cluster.workers):
            assert node is not None
            self._cluster.kill(node)
        self._driver.kill()
        start_nodes(self._cluster)
        self._driver.start()
        return True


def to_the_end(driver: Driver, on_tick: Callable[[], None] = lambda: None) -> float:
    """Seconds until the study is done; the driver is started again where it ended without."""
    begun = time.monotonic()
    while (code := driver.process.poll()) != 0:
        if time.monotonic() > begun + GIVE_UP_SECONDS:
            raise RuntimeError(f"the study does not end: {driver.log}")
        if code is not None:
            driver.start()
        on_tick()
        time.sleep(0.2)
    return time.monotonic() - begun


def start_nodes(cluster: Cluster) -> None:
    """A head that runs no trials, and two workers."""
    cluster.start_head()
    cluster.add_worker()
    cluster.add_worker()


def trial_pids(cluster: Cluster, names: tuple[str, ...] = (ONE_WORKER, TRAIN_WORKER)) -> list[int]:
    """Processes in which a trial is running now, or of a group that may wait for one."""
    return in_trial((pid for node in cluster.workers for pid in node.pids()), names)


def differing(left: pd.DataFrame, right: pd.DataFrame) -> list[str]:
    """Columns in which two tables of the same trials differ in any bit."""
    keep = [c for c in left.columns if c not in MEASURED]
    left, right = (t.sort_values("trial_key", ignore_index=True)[keep] for t in (left, right))
    if len(left) != len(right):
        return ["number of rows"]
    return [c for c in keep if not left[c].equals(right[c])]


def trained_alone(space: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The same trials in this process, each in one go."""
    study = Study.from_dict(space)
    made = [
        train_one(study, row.cell, row.learning_rate, int(row.batch_tokens), seed=int(row.seed))  # pyright: ignore
        for row in rows.itertuples()
    ]
    return row_table(made).to_pandas()


def losses_of_two(space: dict[str, Any], rows: pd.DataFrame, folder: Path) -> list[float]:
    """The losses of the same trials on two processes, each in one go."""
    multiprocessing.spawn(_train_on_two, (space, rows, str(folder)), nprocs=2)  # pyright: ignore
    return json.loads((folder / "losses.json").read_text())


def _train_on_two(rank: int, space: dict[str, Any], rows: pd.DataFrame, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    study, losses = Study.from_dict(space), []
    corpus = prepare(study.space.data, study.folder, sequence_length=study.cells[0].sequence_length)
    for row in rows.to_dict("records"):
        point = row["learning_rate"], int(row["batch_sequences"]), int(row["seed"])
        spec = study.trial(study.cell(row["cell"]), corpus.hash, *point)
        losses.append(train(spec, corpus, workers=Workers.of_process_group("ddp")).loss)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    distributed.destroy_process_group()


def trained(folder: Path) -> pd.Series:
    """Tokens by trial and process, from what `COUNTER` has kept."""
    files = sorted(folder.iterdir())
    names = [tuple(path.name.split(".")) for path in files]
    index = pd.MultiIndex.from_tuples(names, names=["trial_key", "process"])
    return pd.Series([struct.unpack("d", p.read_bytes())[0] for p in files], index, dtype=float)


def twice(counts: pd.Series, rows: pd.DataFrame) -> pd.DataFrame:
    """By trial that was started more than once: `tokens` trained beyond those needed, `starts` in
    another process than before, and the `seconds` of training that each of these cost."""
    of = counts.groupby("trial_key")
    row = rows.set_index("trial_key")
    found = pd.DataFrame({"tokens": of.sum() - row["tokens_trained"], "starts": of.size() - 1})
    found = found[found["starts"] > 0].dropna()
    each = found["tokens"] / found["starts"]
    return found.assign(seconds=each / row["tokens_per_second"].reindex(found.index))


def main() -> None:
    parser = make_parser("chaos", __doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", type=int, default=6, help="rows to be made again")
    parser.add_argument("--folder", type=Path, help="Where results and logs are kept.")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    space = search_space(args.minutes, args.seed)
    counts = folder / "counts"
    counts.mkdir(parents=True)
    env = at_each_step(folder / "shim", COUNTER) | {"COUNTS": str(counts)}
    with Cluster(head_cpus=0, env=env) as cluster, ExitStack() as stack:

        def start(name: str) -> Driver:
            driver = Driver(folder / name, space, "--address", cluster.address, env=cluster.env)
            stack.callback(lambda: driver.kill())
            return driver

        start_nodes(cluster)
        driver = start("chaos")
        chaos = Chaos(cluster, driver, args.seed, 60 * args.minutes)
        seconds = to_the_end(driver, chaos.tick)
    rows = driver.rows()
    finished = rows[rows["status"] == "finished"]
    starts = dict(zip(finished["trial_key"], finished["started_at"], strict=True))
    stored = pd.read_parquet(driver.results / "trials", columns=["trial_key"])["trial_key"]
    one, group = (finished[(finished["world_size"] > 1) == many] for many in (False, True))
    one, group = (f.sample(min(args.alone, len(f)), random_state=args.seed) for f in (one, group))
    columns = differing(trained_alone(space, one), one)
    others = [
        key
        for key, found, loss in zip(
            group["trial_key"], losses_of_two(space, group, folder), group["loss"], strict=True
        )
        if found != loss
    ]
    short = (finished.groupby("cell").size() != space["search"]["trials_per_cell"]).sum()
    again = twice(trained(counts), finished)
    figures = {
        "minutes": seconds / 60,
        "killed": dict(chaos.injected),
        "kills": sum(chaos.injected.values()),
        "kills that ended running trials": chaos.hit_running,
        "driver starts": driver.starts,
        "trials": len(rows),
        "finished trials": len(finished),
        "finished trials lost": sum(key not in starts for key in chaos.seen),
        "finished trials run twice": sum(starts.get(k, t) != t for k, t in chaos.seen.items()),
        "rows stored twice": int(stored.duplicated().sum()),
        "trials seen in flight": len(chaos.in_flight),
        "trials in flight lost": len(chaos.in_flight - set(rows["trial_key"])),
        "cells with other than their trials": int(short),
        "checkpoints left": len(driver.checkpoints()),
        "trials started again": len(again),
        "starts again": int(again["starts"].sum()),
        "tokens trained twice": round(again["tokens"].sum()),
        "tokens needed": round(rows["tokens_trained"].sum()),
        "seconds trained twice a start again, mean": float(
            np.average(again["seconds"], weights=again["starts"]) if len(again) else 0.0
        ),
        "seconds trained twice a start again, most": float(again["seconds"].max()),
        "rows trained again alone": len(one),
        "columns compared": len(rows.columns) - len(MEASURED),
        "columns that differ": columns,
        "rows of two workers trained again": len(group),
        "of these, with another loss": others,
    }
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {f'{value:.3g}' if isinstance(value, float) else value}")
    save(args.json, figures)
    nought = ("finished trials lost", "finished trials run twice", "rows stored twice")
    nought = (*nought, "trials in flight lost", "cells with other than their trials")
    nought = (*nought, "checkpoints left", "columns that differ", "of these, with another loss")
    most = CHECKPOINT_SECONDS + GRACE_SECONDS
    lost = figures["seconds trained twice a start again, mean"] > most
    if any(figures[name] for name in nought) or lost:
        sys.exit(f"not as it should be: see {folder}")


if __name__ == "__main__":
    start(main)
