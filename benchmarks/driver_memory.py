"""How much a driver grows: `python -m benchmarks.driver_memory [--trials 2000]`.

Runs a study of almost empty trials on a local Ray, and samples the resident memory of this
process, the driver, as rows come in. Reported are its sizes after 5 % of the trials, before the
last of them, and at most, the merging of files at the end included; and the number of files.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from pathlib import Path

import numpy as np
from pyarrow import parquet

from benchmarks.entry import make_parser, save, start
from benchmarks.overhead import empty_study
from raysweep.results import Results
from raysweep.results.tables import PART
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
        rows = 0
        while not self.done.wait(SAMPLE_SECONDS):
            rows = max(rows, sum(map(rows_of, self._trials.glob("[!.]*.parquet"))))
            self.samples.append((rows, resident()))


@functools.cache
def rows_of(file: Path) -> int:
    """Rows of a file, which never change; none where it has just been merged into another."""
    if not file.name.startswith(PART):
        return 1
    try:
        return parquet.read_metadata(file).num_rows
    except (OSError, ValueError):
        return 0


def resident() -> float:
    """Megabytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS: this benchmark needs Linux")


def main() -> None:
    parser = make_parser("driver_memory", __doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--strategy", default="random")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = empty_study(args.trials, args.strategy)
        sampler = Sampler(Path(folder) / "results" / "trials")
        sampler.start()
        summary = run(study, results_uri=f"{folder}/results")
        sampler.done.set()
        sampler.join()
        files = sum(path.is_file() for path in Path(folder).rglob("*"))
        rows = len(Results.open(f"{folder}/results").to_pandas())
    counts, sizes = np.array(sampler.samples).T
    late = counts >= 0.05 * args.trials
    slope = np.polyfit(counts[late], sizes[late], 1)[0]
    answer = {
        "trials": rows,
        "megabytes_at_5_percent": float(sizes[late][0]),
        "megabytes_at_the_last_trial": float(sizes[counts < counts.max()][-1]),
        "megabytes_at_most": float(sizes.max()),
        "kilobytes_a_trial": float(1024 * slope),
        "files": files,
        "seconds": summary.seconds,
        "versions": library_versions(),
    }
    print(
        f"{rows} trials: {answer['megabytes_at_5_percent']:.0f} MB after 5 % of them, "
        f"{answer['megabytes_at_the_last_trial']:.0f} MB before the last, "
        f"{answer['megabytes_at_most']:.0f} MB at most (files are merged last), "
        f"{answer['kilobytes_a_trial']:.1f} kB a trial; {files} files; {summary.seconds:.0f} s"
    )
    save(args.json, answer)


if __name__ == "__main__":
    start(main)
