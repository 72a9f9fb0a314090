"""`run`: a study, from its search space to rows in the results folder, on one Tune experiment."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console

from raysweep import allocator
from raysweep.data.corpus import Corpus, corpus_of, data_hash
from raysweep.data.shipping import upload
from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.filesystem import patient
from raysweep.results.lock import study_lock
from raysweep.scaling.datasets import other_data
from raysweep.search.interruption import Interrupted, Interruption
from raysweep.search.loggers import check_loggers, make_callbacks, make_loggers
from raysweep.search.nodes import fingerprint, look_at_nodes, problems
from raysweep.search.progress import Progress
from raysweep.search.record import RunningRecord
from raysweep.search.resources import ResourcePool
from raysweep.search.runtime import cluster_address, cluster_nodes, ray_runtime
from raysweep.search.scheduler import StudyScheduler, bundles_of
from raysweep.study import Cell, Study
from raysweep.text import duration
from raysweep.training.record import library_versions


@dataclass(frozen=True)
class RunSummary:
    """What one run did."""

    results: Results
    started: int
    """Trials concluded in this run."""
    seconds: float
    """Wall time with workers available."""
    utilisation: float
    """Worker-seconds inside training loops over worker-seconds available, 0 to 1."""
    problems: tuple[str, ...]


def run(
    study: Study,
    *,
    results_uri: str | None = None,
    address: str | None = None,
    console: Console | None = None,
    started: Callable[[], None] = lambda: None,
) -> RunSummary:
    """Run what is missing of a study, and return when it is complete.

    Args:
        results_uri: where rows go; `results/STUDY` by default. What stands there is continued.
        address: of a Ray cluster; a local Ray is started if None.
        console: where progress is shown; standard error by default.
        started: called once no other run can hold the study.

    Raises:
        UserError: corpus, results folder or cluster cannot be used, or another run is writing.
        Interrupted: SIGINT or SIGTERM came. Finished trials have their rows, running ones were
            given time to finish or to leave a checkpoint, and the next run goes on from there.
    """
    console = console or Console(stderr=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = Results.open(results_uri or str(Path("results") / study.name), create=True)
    check_loggers(study)
    interruption = Interruption()
    with interruption.listening(), study_lock(results.storage):
        started()
        if study.space.training is not None and study.space.training.external:
            raise UserError(
                f"study {study.name} is trained elsewhere (training.external): 'raysweep ask' "
                "hands out its trials; to train here name a training.function or command"
            )
        corpus = corpus_of(study, lambda text: console.print(text, highlight=False))
        results.save_search_space(study.name, study.resolved().as_yaml())
        everything = results.to_pandas()
        own = everything["study"] == study.name
        running = results.running(study.name)
        scheduler = StudyScheduler(
            study,
            data_hash(study, corpus),
            ResourcePool({}),
            rows=everything[own],
            imported=everything[~own],
            ranges=results.ranges(study.name),
            running=running.get("trials", ()) if running else (),
        )
        if running:  # else an earlier version wrote here, and left no record of its checkpoints
            results.save_running(study.name, {"trials": scheduler.in_flight})
            results.drop_checkpoints()
        space = study.space
        measured_on = None if corpus is None else space.data.validation_sequences
        others = other_data(
            everything[~own], scheduler.data_hash, measured_on, space.model.sequence_length
        )
        if others:
            console.print(f"{results.uri}: {others}", highlight=False, soft_wrap=True)
        warning = corpus and corpus.repeat_warning(max(c.tokens for c in study.cells))
        if warning:
            console.print(f"warning: {warning}", highlight=False)
        if scheduler.done:
            console.print(f"{study.name}: all trials are done: nothing to run", highlight=False)
            return RunSummary(results, 0, 0.0, 0.0, tuple(results.problems))
        address = cluster_address(address)
        with ray_runtime(address) as scratch, interruption.listening():
            scheduler.pool.update(cluster_nodes())
            if address is None:
                _check_room(scheduler)
            elif corpus is not None:  # nodes may join at any time, and share the results URI only
                upload(corpus, results.storage)
            if address is not None or any(c.resources.gpus_per_worker for c in study.cells):
                for line in problems(look_at_nodes(), study.cells, fingerprint()):
                    console.print(f"warning: {line}", highlight=False, soft_wrap=True)
            summary = _run_on_ray(study, corpus, results, scheduler, scratch, console, interruption)
        allocator.give_back_freed()  # what Tune held of all trials, before files are read again
        results.compact()
        results.drop_checkpoints()
    return summary


def _run_on_ray(
    study: Study,
    corpus: Corpus | None,
    results: Results,
    scheduler: StudyScheduler,
    scratch: Path,
    console: Console,
    interruption: Interruption,
) -> RunSummary:
    from ray import tune

    from raysweep.search.callback import RETRIES, StudyCallback
    from raysweep.search.ray_internals import dashboard_url, no_usage_tags
    from raysweep.search.searcher import EarlyStop, StudySearcher
    from raysweep.search.trial import TrialContext, make_trainable, start_group
    from raysweep.training.ray_train import end_groups

    context = TrialContext(
        study=study,
        corpus=corpus,
        results_uri=os.path.abspath(results.uri) if results.storage.is_local else results.uri,
    )
    console.print(
        f"{study.name}: {len(study.cells)} cells, results in {results.uri}, "
        f"{scheduler.pool.total('CPU'):g} CPUs and {scheduler.pool.total('GPU'):g} GPUs",
        highlight=False,
        soft_wrap=True,
    )
    if url := dashboard_url():
        console.print(f"Ray dashboard: {url}", highlight=False, soft_wrap=True)
    trainable = tune.with_resources(
        make_trainable(context),
        lambda config: placement(  # pyright: ignore[reportArgumentType]
            study.cell(config["cell"]), config.get("node")
        ),
    )
    started_at, begun = datetime.now(UTC), time.monotonic()
    with (
        patient(),
        interruption.defer_signals(),
        Progress(scheduler, console) as progress,
        RunningRecord(results, study.name) as record,
    ):
        early_stop = EarlyStop(scheduler)
        searcher = StudySearcher(
            scheduler,
            cluster_nodes,
            interruption,
            functools.partial(start_group, context),
            early_stop.drop_cached_actors,
        )
        callback = StudyCallback(
            scheduler,
            results,
            progress,
            interruption,
            searcher.look,
            record,
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=early_stop,
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=study.name,
                storage_path=str(scratch / "tune"),
                callbacks=[callback, *make_callbacks(make_loggers(study, results))],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        )
        with contextlib.suppress(Interrupted), no_usage_tags():
            tuner.fit()
        end_groups(list(searcher.groups.values()), wait=True)
        callback.end_record()
    seconds = time.monotonic() - begun
    callback.count_available()
    available = callback.available_seconds
    summary: dict[str, Any] = {
        "study": study.name,
        "started_at": started_at.isoformat(),
        "seconds": seconds,
        "workers": scheduler.workers,
        "worker_seconds_available": available,
        "worker_seconds_training": callback.training_seconds,
        "trials": callback.concluded,
        "nodes": len(scheduler.pool.nodes),
        "cpus": scheduler.pool.total("CPU"),
        "gpus": scheduler.pool.total("GPU"),
        "strategy": study.space.search.strategy,
        "versions": library_versions(),
    }
    results.save_run(summary)
    utilisation = min(1.0, callback.training_seconds / available) if available else 0.0
    console.print(
        f"{study.name}: {callback.concluded} trials in {duration(seconds)}, "
        f"workers {utilisation:.0%} in the training loop",
        highlight=False,
    )
    if interruption.signum is not None:
        raise Interrupted(interruption.signum)
    return RunSummary(results, callback.concluded, seconds, utilisation, tuple(results.problems))


def _check_room(scheduler: StudyScheduler) -> None:
    """Raises UserError where this machine, which does not grow, can never hold a trial."""
    pool = scheduler.pool
    for state in filter(scheduler.runnable, scheduler.states.values()):
        bundles = bundles_of(state.cell)
        if not pool.could_ever_fit(bundles):
            needs = ", ".join(f"{name} {len(bundles) * n:g}" for name, n in bundles[0].items())
            raise UserError(
                f"cell {state.cell.name} needs {needs}; this machine has CPU "
                f"{pool.total('CPU'):g}, GPU {pool.total('GPU'):g}: lower the resources of its "
                "scale, drop the scale, or join a cluster with --address"
            )


def placement(cell: Cell, node: str | None = None) -> Any:
    """What Tune asks Ray for to run a trial: on that node, if it still has room there."""
    from ray import tune

    bundles = bundles_of(cell)
    # Ray Train holds the bundles of several workers itself; the trial only waits for them. It takes
    # a byte of memory because Tune wants something, and even 0.001 CPU would be one too few.
    own: list[dict[str, int | float]] = [{"memory": 1}]
    if len(bundles) == 1:
        own = [dict(bundles[0])]
    if node is None:
        return tune.PlacementGroupFactory(own)
    from raysweep.search.ray_internals import placement_hint

    return tune.PlacementGroupFactory(own, **placement_hint(node))
