"""A study through everything that breaks: `python -m benchmarks.chaos --minutes 5 [--seed S]`.

A study of tiny trials (sampler `grid`, checkpoints every second) runs on three Ray nodes of this
machine, through `raysweep run` in a process of its own. Every 10 to 20 s something is killed with
SIGKILL: a trial's worker, the driver (then the same command again), a whole node (then another
joins), the head with all nodes (then a new cluster, and the same command again). In the end its
rows are compared with those of the same study left in peace: none lost, none twice, every column
that measures neither time nor place bit-equal, and the laws fitted from both the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pandas as pd
import yaml

from benchmarks.nodes import Cluster, command_of
from raysweep.results import Results
from raysweep.scaling.fits import fit

REPO = Path(__file__).resolve().parent.parent
MEASURED = (
    "started_at",
    "seconds_wall",
    "seconds_train",
    "tokens_per_second",
    "peak_memory_bytes",
    "worker",
    "device",
    "git_revision",
)
"""Columns that say when, where and how fast; all others must be equal."""
PAUSES = (10.0, 20.0)
"""Shortest and longest time between two kills, seconds."""
ROUND = ("worker", "driver", "worker", "node", "worker", "driver", "node", "head")
"""What is killed in one round, in an order shuffled anew each time."""
GIVE_UP_SECONDS = 1200.0
"""A study that is not done this long after the last kill never will be."""


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
            {"name": "c", "d_model": 24, "layers": 1, "heads": 1},
        ],
        "horizons": [{"tokens": 150_000}, {"tokens": 300_000}],
        "search": {
            "strategy": "grid",
            "trials_per_cell": max(2, 2 * round(minutes)),
            "extend_edges": False,
            "learning_rate": {"low": 1e-3, "high": 1e-1},
            "batch_sequences": {"low": 4, "high": 8},
        },
        "recipe": {"checkpoint_seconds": 1},
        "data": {"max_megabytes": 2, "validation_sequences": 64},
    }


class Driver:
    """`raysweep run` in a process of its own, started again as often as it takes."""

    def __init__(self, folder: Path, space: Path, cluster: Cluster) -> None:
        self.results = folder / "results"
        self.starts = 0
        self.log = folder / "driver.log"
        self._cluster = cluster
        self._command = [sys.executable, "-m", "raysweep.cli", "run", str(space)]
        self._command += ["--results", str(self.results), "--report", str(folder / "report")]
        folder.mkdir(parents=True)
        self.start()

    def start(self) -> None:
        """The same command, once more."""
        self.starts += 1
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "--address", self._cluster.address],
                stdout=log,
                stderr=log,
                cwd=REPO,
                env=self._cluster.env,
            )

    def kill(self) -> None:
        """End it without a word."""
        self.process.send_signal(SIGKILL)
        self.process.wait()

    def rows(self) -> pd.DataFrame:
        """What stands in the results folder now."""
        with suppress(ValueError):
            return Results.open(self.results).frame()
        return pd.DataFrame({"trial_key": [], "status": []})

    def to_the_end(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Wait until the study is done; start the driver again where it ended without."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while (code := self.process.poll()) != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the study does not end: {self.log.read_text()[-3000:]}")
            if code is not None:
                self.start()
            on_tick()
            time.sleep(0.2)


class Chaos:
    """Kills one thing after another while a study runs."""

    def __init__(self, cluster: Cluster, driver: Driver, seed: int, seconds: float) -> None:
        self.injected: Counter[str] = Counter()
        self.hit_running = 0
        """Kills of workers, nodes and the head that ended at least one running trial."""
        self.seen: dict[str, pd.Timestamp] = {}
        """Finished trials seen before some kill, with the time of their start."""
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
        kind = self._queue.pop()
        if getattr(self, f"_kill_{kind}")():
            self.injected[kind] += 1
            print(f"{now - self._until:+6.0f} s: {kind} killed, {len(self.seen)} finished before")
        else:
            self._queue.append(kind)  # nothing of that kind runs: soon again
        self._next = time.monotonic() + self._pause()

    def _pause(self) -> float:
        return self._random.uniform(*PAUSES)

    def _kill_worker(self) -> bool:
        running = trial_pids(self._cluster)
        if not running:
            self._next = 0.0
            return False
        self.hit_running += 1
        os.kill(self._random.choice(running), SIGKILL)
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
        begun = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            self._driver.process.wait(90)
        print(f"        the driver ended {time.monotonic() - begun:.0f} s after its head")
        start_nodes(self._cluster)
        if self._driver.process.poll() is None:
            self._driver.kill()
        self._driver.start()
        return True


def start_nodes(cluster: Cluster) -> None:
    """A head that runs no trials, and two workers."""
    cluster.start_head()
    cluster.add_worker()
    cluster.add_worker()


def trial_pids(cluster: Cluster) -> list[int]:
    """Workers in which a trial is running now."""
    pids = [pid for node in cluster.workers for pid in node.pids()]
    return [pid for pid in pids if "ray::ImplicitFunc.train" in command_of(pid)]


def differing(left: pd.DataFrame, right: pd.DataFrame) -> list[str]:
    """Columns in which two tables of the same trials differ in any bit."""
    keep = [c for c in left.columns if c not in MEASURED]
    left, right = (t.sort_values("trial_key", ignore_index=True)[keep] for t in (left, right))
    if len(left) != len(right):
        return ["number of rows"]
    return [c for c in keep if not left[c].equals(right[c])]


def laws(frame: pd.DataFrame) -> dict[str, object]:
    """All that is fitted, as plain values."""
    return fit(frame.sort_values("trial_key", ignore_index=True), n_boot=20).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where results and logs are kept.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    folder.mkdir(parents=True, exist_ok=True)
    space = folder / "chaos.yaml"
    space.write_text(yaml.safe_dump(search_space(args.minutes, args.seed)))
    with Cluster(head_cpus=0) as cluster:
        start_nodes(cluster)
        begun = time.monotonic()
        calm = Driver(folder / "calm", space, cluster)
        calm.to_the_end()
        calm_seconds = time.monotonic() - begun
        undisturbed = calm.rows()
        print(f"left in peace: {len(undisturbed)} trials in {calm_seconds:.0f} s")
        begun = time.monotonic()
        driver = Driver(folder / "chaos", space, cluster)
        chaos = Chaos(cluster, driver, args.seed, 60 * args.minutes)
        driver.to_the_end(chaos.tick)
        seconds = time.monotonic() - begun
    rows = driver.rows()
    finished = rows[rows["status"] == "finished"]
    starts = dict(zip(finished["trial_key"], finished["started_at"], strict=True))
    stored = pd.read_parquet(driver.results / "trials", columns=["trial_key"])["trial_key"]
    columns = differing(undisturbed, rows)
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
        "trials missing": len(set(undisturbed["trial_key"]) - set(rows["trial_key"])),
        "trials too many": len(set(rows["trial_key"]) - set(undisturbed["trial_key"])),
        "columns compared": len(rows.columns) - len(MEASURED),
        "columns that differ": columns,
        "laws equal": laws(undisturbed) == laws(rows),
    }
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {f'{value:.1f}' if isinstance(value, float) else value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    nought = ("finished trials lost", "finished trials run twice", "rows stored twice")
    nought = (*nought, "trials missing", "trials too many", "columns that differ")
    if any(figures[name] for name in nought) or not figures["laws equal"]:
        sys.exit(f"not equal to the study left in peace: see {folder}")


if __name__ == "__main__":
    main()
