"""How much a driver grows: `python -m benchmarks.driver_memory [--trials 2000]`.

Runs a study of almost empty trials on a local Ray, and samples the resident memory of this
process, the driver, as rows come in. Reported is the growth from when 5 % of the trials are through
to the end, and the number of files in the results folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path

import numpy as np

from benchmarks.overhead import empty_study
from raysweep.results import Results
from raysweep.search.run import run
from raysweep.training.record import library_versions

SAMPLE_SECONDS = 1.0


class Sampler(threading.Thread):
    """Resident megabytes of this process over rows in a results folder."""

    def __init__(self, trials: Path) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, float]] = []
        self.done = threading.Event()
        self._trials = trials

    def run(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self.samples.append((len(list(self._trials.glob("[!.]*.parquet"))), resident()))


def resident() -> float:
    """Megabytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS: this benchmark needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--strategy", default="random")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = empty_study(args.trials, args.strategy)
        sampler = Sampler(Path(folder) / "results" / "trials")
        sampler.start()
        summary = run(study, results_uri=f"{folder}/results")
        sampler.done.set()
        sampler.join()
        files = sum(path.is_file() for path in Path(folder).rglob("*"))
        rows = len(Results.open(f"{folder}/results").frame())
    counts, sizes = np.array(sampler.samples).T
    before = counts < summary.started  # compaction comes after the last trial
    counts, sizes = counts[: before.sum()], sizes[: before.sum()]
    late = counts >= 0.05 * args.trials
    slope = np.polyfit(counts[late], sizes[late], 1)[0]
    answer = {
        "trials": rows,
        "megabytes_at_5_percent": float(sizes[late][0]),
        "megabytes_at_the_end": float(sizes[late][-1]),
        "kilobytes_a_trial": float(1024 * slope),
        "files": files,
        "seconds": summary.seconds,
        "versions": library_versions(),
    }
    print(
        f"{rows} trials: {answer['megabytes_at_5_percent']:.0f} MB after 5 % of them, "
        f"{answer['megabytes_at_the_end']:.0f} MB at the end, "
        f"{answer['kilobytes_a_trial']:.1f} kB a trial; {files} files; {summary.seconds:.0f} s"
    )
    if args.json:
        args.json.write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
