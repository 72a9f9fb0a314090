"""Ask and tell: a study whose trials are trained elsewhere, by any scheduler, from any process.

Nothing is kept in memory. Whoever asks takes the folder's lock, rebuilds the study's scheduler from
the rows and the trials handed out, asks it as Tune would, and notes what it hands out. So any
number of processes may ask and tell at once, and a study goes on from what its folder holds.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.lock import study_lock
from raysweep.results.pending import (
    Pending,
    Status,
    as_lifetime,
    read_pending,
    tell,
    write_pending,
)
from raysweep.results.schema import FINISHED
from raysweep.search.resources import ResourcePool
from raysweep.search.restore import RUNNING
from raysweep.search.scheduler import StudyScheduler
from raysweep.study import Study
from raysweep.training.record import spec_columns

EXPIRES = timedelta(hours=24)
"""A trial that is not told for so long counts as given up."""
WAIT_SECONDS = 60.0
"""For others that ask at the same time, each for a second or so."""
POLL_SECONDS = 5.0
"""Between two tries where all that is left waits on trials handed out."""


@dataclass(frozen=True)
class AskedTrial:
    """A trial to train: tell its loss with its `id`."""

    id: str
    learning_rate: float
    """The peak."""
    batch_tokens: int
    batch_sequences: int
    tokens: int
    """The horizon: what to train on in all."""
    steps: int
    seed: int
    scale: str
    architecture: str
    settings: dict[str, Any]
    """Those of the study file for this scale, and all the rest by name."""

    @classmethod
    def of(cls, found: Pending) -> AskedTrial:
        names = [n for n in cls.__dataclass_fields__ if n not in ("id", "settings")]
        values = {name: found.values[name] for name in names}
        return cls(id=found.id, settings=found.values, **values)


class Sweep:
    """A study to be asked and told: `with Sweep("space.yaml", "results/mine") as sweep: ...`.

    Args:
        study: a `Study`, or the path of its search-space file.
        results: results folder or URI; `results/STUDY` by default.
        expires: how long a trial may take until it counts as given up, in seconds or as timedelta.
        retry_crashed: hand out trials that crashed again, once. What crashes after that stays
            crashed until the study is done; whoever then asks with this begins anew.

    With the same seed it proposes what a Ray run of one worker would, for as long as trials are
    asked and told one by one. More at once learn from each other as workers of a cluster do.
    """

    def __init__(
        self,
        study: Study | str | Path,
        results: str | None = None,
        *,
        expires: timedelta | float = EXPIRES,
        retry_crashed: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = study if isinstance(study, Study) else Study.load(study)
        if self.study.space.recipe.branches:
            raise UserError("recipe.branches: its trials give several rows, and cannot be asked")
        self._uri = results or str(Path("results") / self.study.name)
        self._results = Results.open(self._uri, create=True)
        self._expires, self._retry = as_lifetime(expires), retry_crashed
        self._retry_since: datetime | None = None
        self._saved = False
        self.done = False
        """Whether, when it was asked last, nothing was left to hand out and nothing pending."""

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held between calls."""

    def ask(self, wait: bool = False) -> AskedTrial | None:
        """The next trial; None where there is none now (`done` says whether none will follow).

        `wait` returns only with a trial, or when the study is done."""
        while True:
            if asked := self.ask_many(1):
                return asked[0]
            if self.done or not wait:
                return None
            time.sleep(POLL_SECONDS)

    def ask_many(self, count: int) -> list[AskedTrial]:
        """Up to so many trials at once."""
        storage = self._results.storage
        with _turn(self._results):
            scheduler = self._scheduler()
            found = []
            for _ in range(count):
                proposal = scheduler.ask(f"asked-{len(found)}")
                if proposal is None:
                    break
                spec = proposal.spec
                columns = spec_columns(spec) | {"strategy": self.study.space.search.strategy}
                pending = write_pending(storage, columns, spec.values(), self._expires)
                found.append(AskedTrial.of(pending))
            self.done = not found and scheduler.done
            if self.done and self._retry:
                self._retry_since = None
                self._results.save_retry(self.study.name, None)
            if scheduler.widenings:
                self._results.save_ranges(self.study.name, scheduler.widened)
        return found

    def tell(
        self,
        trial: AskedTrial | str,
        loss: float | None = None,
        *,
        status: Status = FINISHED,
        reason: str | None = None,
        **measured: Any,
    ) -> None:
        """The outcome of a trial: its final loss in nats a token, or how else it ended."""
        name = trial if isinstance(trial, str) else trial.id
        measured |= {"loss": loss, "status": status, "reason": reason}
        tell(name, results_uri=self._results.uri, **measured)

    def _scheduler(self) -> StudyScheduler:
        """The study as it stands in its folder."""
        from raysweep.data.corpus import corpus_of, data_hash

        study, results = self.study, self._results
        if not self._saved:
            results.save_search_space(study.name, study.resolved().as_yaml())
            self._saved = True
        pending = [p for p in read_pending(results.storage, study.name) if not p.expired]
        results.compact()
        rows = results.to_pandas()
        own = rows["study"] == study.name
        mine = rows[own]
        if self._retry:
            since = pd.Timestamp(self._begin_retry())
            mine = mine[(mine["status"] != "crashed") | (mine["started_at"] >= since)]
        told = set(mine["trial_key"])
        running = [
            {**p.columns, "status": RUNNING, "started_at": pd.Timestamp(p.asked_at)}
            for p in pending
            if p.columns["trial_key"] not in told
        ]
        if running:
            frame = pd.DataFrame(running).reindex(columns=mine.columns)
            mine = pd.concat([mine, frame]) if len(mine) else frame
        mine = mine.sort_values("started_at", kind="stable")
        last = mine["started_at"].max()
        ended = mine["started_at"] + pd.to_timedelta(mine["seconds_wall"].astype(float), unit="s")
        room = {"CPU": math.inf, "GPU": math.inf}
        return StudyScheduler(
            study,
            data_hash(study, corpus_of(study)),
            ResourcePool({"elsewhere": room}),
            rows=mine,
            imported=rows[~own],
            ranges=results.ranges(study.name),
            told=set(mine.loc[ended >= last, "cell"]),
        )

    def _begin_retry(self) -> datetime:
        """Since when crashed trials are handed out again, by this Sweep or by others before it."""
        if self._retry_since is None:
            self._retry_since = self._results.retry(self.study.name)
        if self._retry_since is None:
            self._retry_since = datetime.now(UTC)
            self._results.save_retry(self.study.name, self._retry_since)
        return self._retry_since


@contextmanager
def _turn(results: Results) -> Iterator[None]:
    """Hold the folder, waiting for others that ask."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(study_lock(results.storage))
            except UserError:
                if time.monotonic() > deadline:
                    raise
            else:
                yield
                return
        time.sleep(random.uniform(0.05, 0.2))


def shell_words(values: Sequence[tuple[str, Any]]) -> str:
    """`name=value` words for a shell's `eval`, of those whose names are variables' names."""
    import json
    import shlex

    words = []
    for name, value in values:
        if name.isidentifier() and name.isascii():
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"{name}={shlex.quote(text)}")
    return " ".join(words)
