"""One trial in this process, without Ray: `raysweep train`."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

from raysweep.data.corpus import corpus_of, data_hash
from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.filesystem import Storage
from raysweep.study import Study, TrialSpec
from raysweep.training.command import train_by_command
from raysweep.training.loop import train
from raysweep.training.outcome import Silent, TrialOutcome
from raysweep.training.own import train_by_function
from raysweep.training.record import trial_row


def train_one(
    study: Study,
    cell_name: str,
    learning_rate: float,
    batch_tokens: int,
    *,
    seed: int | None = None,
    results_uri: str | None = None,
) -> dict[str, Any]:
    """Train one trial of a cell here and return its row; keep it if `results_uri` is given.

    Further hyperparameters that the study searches are in the middle of their ranges.

    Raises:
        UserError: unknown cell, a learning rate that is not positive, or a batch that is no whole
            number of sequences.
    """
    cell = study.cell(cell_name)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UserError(f"--lr {learning_rate} must be a positive number")
    length = cell.sequence_length
    if batch_tokens < length or batch_tokens % length:
        near = max(1, round(batch_tokens / length)) * length
        raise UserError(
            f"--batch-tokens {batch_tokens} is no multiple of the sequence length {length}: "
            f"use {near}"
        )
    if batch_tokens > cell.tokens:
        raise UserError(
            f"--batch-tokens {batch_tokens} is more than the {cell.tokens:,} tokens of cell "
            f"{cell.name}: use fewer"
        )
    results = Results.open(results_uri, create=True) if results_uri else None
    corpus = corpus_of(study)
    spec = study.trial(
        cell,
        data_hash(study, corpus),
        learning_rate,
        batch_tokens // length,
        study.space.seed if seed is None else seed,
        {name: given.middle for name, given in study.space.search.also.items()},
    )
    started_at, begun = datetime.now(UTC), time.monotonic()
    if corpus is None:
        outcome = _train_own(study, spec, results)
    else:
        outcome = train(spec, corpus, threads=cell.resources.threads)
    row = trial_row(
        spec,
        outcome,
        strategy="manual",
        train_tokens=corpus and corpus.train_tokens,
        started_at=started_at,
        seconds_wall=time.monotonic() - begun,
    )
    if results is not None:
        results.write(row, outcome.curve)
    return row


def _train_own(study: Study, spec: TrialSpec, results: Results | None) -> TrialOutcome:
    """Train by the user's function, as one worker, or command."""
    assert spec.training is not None
    if spec.training.external:
        raise UserError("the study is trained elsewhere (training.external): ask for its trials")

    def end(reason: str) -> None:
        print(f"error: {reason}", file=sys.stderr)
        os._exit(1)

    with tempfile.TemporaryDirectory(prefix="raysweep-") as scratch:
        storage = Storage.at(scratch) if results is None else results.storage
        if spec.training.command is not None:
            return train_by_command(spec, study.folder, storage, Silent())
        return train_by_function(spec, study.folder, storage, Silent(), on_timeout=end)
