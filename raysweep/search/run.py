"""`run`: a study from its search space to rows in the results folder, on one Ray Tune experiment."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from raysweep.config import Study
from raysweep.data.corpus import Corpus, prepare
from raysweep.results import Results
from raysweep.results.lock import study_lock
from raysweep.search.campaign import Campaign, bundles_of
from raysweep.search.ledger import Ledger
from raysweep.search.progress import Progress, clock
from raysweep.search.runtime import cluster_nodes, ray_runtime
from raysweep.training.record import crashed_row, library_versions

_log = logging.getLogger("raysweep")

RETRIES = 2
"""How often Tune starts a trial again whose worker died."""
NODES_SECONDS = 5.0
"""Least time between two looks at the cluster's nodes."""


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
) -> RunSummary:
    """Run what is missing of a study, and return when it is complete.

    Args:
        results_uri: where rows go; `results/STUDY` by default. What stands there is continued.
        address: of a Ray cluster; a local Ray is started if None.
        console: where progress is shown; standard error by default.

    Raises:
        UserError: corpus, results folder or cluster cannot be used, or another run is writing.
    """
    console = console or Console(stderr=True)
    results = Results.open(results_uri or str(Path("results") / study.name), create=True)
    with study_lock(results.storage):
        corpus = prepare(
            study.space.data,
            study.folder,
            sequence_length=study.space.model.sequence_length,
            progress=lambda text: console.print(text, highlight=False),
        )
        results.save_search_space(study.name, _as_yaml(study))
        results.compact()
        everything = results.frame()
        own = everything["study"] == study.name
        campaign = Campaign(
            study, corpus.hash, Ledger({}), rows=everything[own], history=everything[~own]
        )
        for line in _warnings(study, corpus):
            console.print(f"note: {line}", highlight=False)
        if campaign.done:
            console.print(f"{study.name}: all trials are done: nothing to run", highlight=False)
            return RunSummary(results, 0, 0.0, 0.0, tuple(results.problems))
        with ray_runtime(address) as scratch:
            summary = _run_on_ray(study, corpus, results, campaign, scratch, console)
        results.compact()
    return summary


def _run_on_ray(
    study: Study,
    corpus: Corpus,
    results: Results,
    campaign: Campaign,
    scratch: Path,
    console: Console,
) -> RunSummary:
    from ray import tune

    from raysweep.search.searcher import CampaignSearcher
    from raysweep.search.trial import TrialContext, make_trainable

    nodes = cluster_nodes()
    campaign.ledger.update(nodes)
    cpus_per_worker = study.cells[0].resources.cpus_per_worker
    workers = _workers(campaign)
    context = TrialContext(
        study=study,
        corpus=corpus,
        results_uri=os.path.abspath(results.uri) if results.storage.is_local else results.uri,
        threads=max(1, int(cpus_per_worker)),
    )
    console.print(
        f"{study.name}: {len(study.cells)} cells, results in {results.uri}, "
        f"{campaign.ledger.total('CPU'):g} CPUs and {campaign.ledger.total('GPU'):g} GPUs",
        highlight=False,
    )
    trainable = tune.with_resources(
        make_trainable(context),
        lambda config: _placement(study, config["cell"]),  # pyright: ignore[reportArgumentType]
    )
    started_at, begun = datetime.now(UTC), time.monotonic()
    with Progress(campaign, console, workers) as progress:
        watcher = _watcher(study, corpus, results, campaign, progress, workers)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=CampaignSearcher(campaign, watcher.look_at_nodes),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=study.name,
                storage_path=str(scratch / "tune"),
                callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        )
        tuner.fit()
    seconds = time.monotonic() - begun
    available = watcher.worker_seconds
    record: dict[str, Any] = {
        "study": study.name,
        "started_at": started_at.isoformat(),
        "seconds": seconds,
        "workers": workers,
        "worker_seconds_available": available,
        "worker_seconds_training": watcher.training_seconds,
        "trials": watcher.concluded,
        "nodes": len(nodes),
        "cpus": campaign.ledger.total("CPU"),
        "gpus": campaign.ledger.total("GPU"),
        "strategy": study.space.search.strategy,
        "versions": library_versions(),
    }
    results.save_run(record)
    utilisation = watcher.training_seconds / available if available else 0.0
    console.print(
        f"{study.name}: {watcher.concluded} trials in {clock(seconds)}, "
        f"workers {utilisation:.0%} in the training loop",
        highlight=False,
    )
    return RunSummary(results, watcher.concluded, seconds, utilisation, tuple(results.problems))


def _watcher(
    study: Study,
    corpus: Corpus,
    results: Results,
    campaign: Campaign,
    progress: Progress,
    workers: float,
) -> Any:
    """A Tune callback that shows progress, keeps the books, and writes the rows of crashed trials.

    Made here, inside a function, because its base class needs Ray.
    """
    from ray import tune

    class Watcher(tune.Callback):
        def __init__(self) -> None:
            self.begun = time.monotonic()
            self.training_seconds = 0.0
            self.concluded = 0
            self._looked = 0.0
            self._starts: dict[str, tuple[float, datetime]] = {}

        @property
        def worker_seconds(self) -> float:
            return workers * (time.monotonic() - self.begun)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self

        def look_at_nodes(self, campaign: Campaign) -> None:
            now = time.monotonic()
            if now - self._looked > NODES_SECONDS:
                self._looked = now
                campaign.ledger.update(cluster_nodes())

        def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
            progress.refresh()

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._starts[trial.trial_id] = time.monotonic(), datetime.now(UTC)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._conclude(trial, (trial.last_result or {}).get("status", "stopped"))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._conclude(trial, "crashed")
            begun, started_at = self._starts.get(
                trial.trial_id, (time.monotonic(), datetime.now(UTC))
            )
            config = trial.config
            spec = study.trial(
                study.cell(config["cell"]),
                corpus.hash,
                config["learning_rate"],
                config["batch_sequences"],
                config["seed"],
            )
            standing = results.find(spec.key)
            if standing is not None and standing["status"] != "crashed":
                return  # its worker died after it had written its row
            reason = _reason(trial)
            _log.warning("trial %s in cell %s crashed: %s", spec.key, spec.cell.name, reason)
            results.write(
                crashed_row(
                    spec,
                    reason,
                    strategy=study.space.search.strategy,
                    started_at=started_at,
                    seconds_wall=time.monotonic() - begun,
                )
            )

        def _conclude(self, trial: Any, status: str) -> None:
            self.concluded += 1
            result = trial.last_result or {}
            self.training_seconds += float(result.get("seconds_train") or 0.0)
            begun, _ = self._starts.get(trial.trial_id, (time.monotonic(), None))
            progress.trial_done(trial.config["cell"], status, time.monotonic() - begun)

    return Watcher()


def _reason(trial: Any) -> str:
    """The last line of a trial's error."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):
        return "worker died"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "worker died"


def _placement(study: Study, cell_name: str) -> Any:
    from ray import tune

    cell = study.cell(cell_name)
    bundles = bundles_of(cell)
    if len(bundles) > 1:
        # Ray Train reserves the workers' bundles itself; the trial only waits for them.
        return tune.PlacementGroupFactory([{"CPU": 0.001}])
    return tune.PlacementGroupFactory([dict(bundles[0])])


def _workers(campaign: Campaign) -> float:
    """How many trials of the smallest cell the cluster holds at once."""
    bundle = bundles_of(next(iter(campaign.states.values())).cell)[0]
    return max(1.0, min(campaign.ledger.total(n) / a for n, a in bundle.items() if a))


def _warnings(study: Study, corpus: Corpus) -> list[str]:
    longest = max(study.cells, key=lambda c: c.tokens)
    epochs = corpus.epochs(longest.tokens)
    if epochs <= 1:
        return []
    return [
        f"the longest horizon ({longest.tokens:.3g} tokens) is {epochs:.1f} epochs of the corpus "
        f"({corpus.train_tokens:.3g} tokens): losses past 4 epochs are not those of fresh data"
    ]


def _as_yaml(study: Study) -> str:
    import yaml

    return yaml.safe_dump(study.space.model_dump(mode="json"), sort_keys=False)
