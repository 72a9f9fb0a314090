"""What a trial costs besides its training: `python -m benchmarks.overhead [--trials 200]
[--workers 2] [--own] [--reports]`.

Runs a study of almost empty trials (one layer of width 4, eight steps of one sequence) on a local
Ray with one CPU a worker. It reports what each trial but a worker's first costs besides training:
the time between two starts on a worker, less the training. The peer, in the same process, is a bare
Tune experiment with reused actors whose trials report once and return.

With `--own` the trials are those of a user's function that returns at once: what the function path
costs beyond the user's code.

With `--reports` it is what progress costs where many trials report at once: trials of 60 cells, 20
at a time, tell theirs five times a second each, as often as 500 trials do in all, and do nothing
between. Reported is the share of a trial's time that its reports are waited for.

With several workers, each trial runs on all of them together, in a group that is kept. It reports
the seconds from the start of the first trial to its end, and of those that follow the median of
what each takes, training included.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.entry import make_parser, save, start
from raysweep.results import Results
from raysweep.search.run import run
from raysweep.search.runtime import ray_runtime
from raysweep.study import Study
from raysweep.training.record import library_versions


def empty_study(trials: int, strategy: str = "random", workers: int = 1) -> Study:
    """A study whose trials do next to nothing."""
    return Study.from_dict(
        {
            "study": "empty",
            "scales": [{"d_model": 4, "layers": 1, "heads": 1}],
            "model": {"sequence_length": 8},
            "horizons": [{"tokens": 64 * workers}],
            "search": {
                "strategy": strategy,
                "trials_per_cell": trials,
                "extend_edges": False,
                "batch_sequences": {"low": workers, "high": workers},
            },
            "data": {"max_megabytes": 1, "validation_sequences": workers},
            "resources": {"workers": workers},
        }
    )


def own_study(trials: int, folder: Path) -> Study:
    """A study of a user's function that does nothing, in a module in that folder."""
    (folder / "overhead_nothing.py").write_text("def train(run):\n    return 3.0\n")
    space = {
        "study": "empty",
        "training": {"function": "overhead_nothing:train"},
        "scales": [{"name": "s", "params": 1e6, "flops_per_token": 6e6}],
        "horizons": [{"tokens": 1e9}],
        "search": {"strategy": "random", "trials_per_cell": trials, "extend_edges": False},
    }
    return Study.from_dict(space, folder)


REPORTERS, REPORTS, PAUSE_SECONDS = 20, 150, 0.2
"""Trials at once, reports of each, and the time between them."""

REPORTING = f"""
import time
import raysweep.search.trial
raysweep.search.trial.REPORT_SECONDS = 0.0

def train(run):
    waited, begun = 0.0, time.perf_counter()
    for step in range({REPORTS}):
        time.sleep({PAUSE_SECONDS})
        asked = time.perf_counter()
        run.report((step + 1) * run.tokens / {REPORTS}, 3.0)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - begun)
"""
"""A user's function whose loss is the share of its time that reports take."""


def reports() -> dict[str, Any]:
    """What reports cost a trial, where 20 of 60 cells report 100 times a second together."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "overhead_reporting.py").write_text(REPORTING)
        scales = [{"params": 1e6 * 1.1**i, "flops_per_token": 6e6 * 1.1**i} for i in range(30)]
        space = {
            "study": "reports",
            "training": {"function": "overhead_reporting:train"},
            "scales": scales,
            "horizons": [{"tokens": 1e9}, {"tokens": 2e9}],
            "search": {"strategy": "ladder", "trials_per_cell": 1, "extend_edges": False},
            "resources": {"cpus_per_worker": (os.cpu_count() or 1) / REPORTERS},
        }
        study = Study.from_dict(space, Path(folder))
        frame = run(study, results_uri=f"{folder}/results").results.to_pandas()
    later = frame.sort_values("started_at")[REPORTERS:]  # the others start while processes do
    shares, seconds = later["loss"], later["seconds_train"]
    answer = {
        "trials": len(later),
        "reports_a_second": REPORTERS * REPORTS / float(seconds.median()),
        "share_waited": [float(share) for share in shares],
    }
    print(
        f"{answer['reports_a_second']:.0f} reports a second of {REPORTERS} trials in 60 cells: "
        f"median {shares.median():.1%} of a trial waited for them, worst {shares.max():.1%} "
        f"(n={len(later)})"
    )
    return answer


def gaps(results: Results) -> np.ndarray:
    """Seconds each worker lost a trial after its first: time between starts, less training."""
    frame = results.to_pandas().sort_values("started_at")
    lost: list[float] = []
    for _, of_worker in frame.groupby("worker"):
        starts = of_worker["started_at"].astype("int64").to_numpy() / 1e6
        lost.extend(np.diff(starts) - of_worker["seconds_train"].to_numpy()[:-1])
    return np.array(lost)


def bare_tune(trials: int) -> float:
    """Seconds a trial and worker of the plainest Tune experiment with reused actors."""
    import time

    with ray_runtime(None) as scratch:
        from ray import tune

        stamps = scratch / "stamps"
        stamps.mkdir()

        def nothing(config: dict[str, Any]) -> None:
            with open(stamps / str(os.getpid()), "a") as stream:
                stream.write(f"{time.time()}\n")
            tune.report({"loss": 0.0})

        tuner = tune.Tuner(
            tune.with_resources(nothing, {"cpu": 1}),
            param_space={"i": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(scratch / "bare"), verbose=0),
        )
        tuner.fit()
        times = [np.diff([float(t) for t in p.read_text().split()]) for p in Path(stamps).iterdir()]
    return float(np.median(np.concatenate(times)))


def in_a_group(trials: int, workers: int) -> dict[str, Any]:
    """Seconds of the first trial on several workers, and of each that follows in their group."""
    with tempfile.TemporaryDirectory() as folder:
        study = empty_study(trials, workers=workers)
        frame = run(study, results_uri=f"{folder}/results").results.to_pandas()
    frame = frame.sort_values("started_at")
    assert (frame["status"] == "finished").all()
    first, *_ = frame["seconds_wall"]
    starts = frame["started_at"].astype("int64").to_numpy() / 1e6
    later = np.diff(starts)[1:]  # the first start of a Tune actor is that of the first trial
    print(
        f"{trials} empty trials on {workers} workers: first {first:.1f} s, then median "
        f"{np.median(later):.2f} s, 95th percentile {np.percentile(later, 95):.2f} s, "
        f"worst {later.max():.2f} s (n={len(later)})"
    )
    return {
        "trials": trials,
        "workers": workers,
        "seconds_first": float(first),
        "seconds_then": [float(s) for s in later],
    }


def one_by_one(trials: int, own: bool) -> dict[str, Any]:
    """What a trial on one worker costs besides its training, and one of bare Tune."""
    with tempfile.TemporaryDirectory() as folder:
        study = own_study(trials, Path(folder)) if own else empty_study(trials)
        lost = gaps(run(study, results_uri=f"{folder}/results").results)
    peer = bare_tune(trials)
    median, worst = float(np.median(lost)), float(np.percentile(lost, 95))
    print(
        f"lost a trial after the first on each worker: median {median:.3f} s, "
        f"95th percentile {worst:.3f} s (n={len(lost)}); bare Tune {peer:.3f} s"
    )
    return {
        "trials": trials,
        "seconds_lost_median": median,
        "seconds_lost_p95": worst,
        "bare_tune_seconds_median": peer,
    }


def main() -> None:
    parser = make_parser("overhead", __doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1, help="of each trial")
    parser.add_argument("--own", action="store_true", help="a user's function, not our models")
    parser.add_argument("--reports", action="store_true", help="what reports cost, only")
    args = parser.parse_args()
    if args.reports:
        answer = reports()
    elif args.workers > 1:
        answer = in_a_group(args.trials, args.workers)
    else:
        answer = one_by_one(args.trials, args.own)
    save(args.json, answer | {"cpus": os.cpu_count(), "versions": library_versions()})


if __name__ == "__main__":
    start(main)
