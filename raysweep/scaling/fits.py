"""Fits: everything fitted to one results table, with what it predicts and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.columns import rows_where
from raysweep.results.importers import read_runs
from raysweep.scaling.fitted import Fitted, Many, paired, scalar, single
from raysweep.scaling.prediction import NEEDED as SIZED
from raysweep.scaling.prediction import Score, predict_around, predict_runs, score_runs
from raysweep.scaling.recommend import Recommendation
from raysweep.scaling.summary import summary
from raysweep.text import read_number

__all__ = ["Fits", "Recommendation"]


@dataclass(frozen=True, eq=False, repr=False)
class Fits(Fitted):
    """What `fit` returns: see `Fitted` for what it holds and answers."""

    def predict(
        self,
        learning_rate: Many,
        batch_tokens: Many,
        params: float | str,
        tokens: float | str,
        architecture: str | None = None,
        experts: int | None = None,
        top_k: int | None = None,
        *,
        group: str | None = None,
    ) -> pd.DataFrame:
        """The loss of a run at any learning rates and batches: `loss`, `low`, `high`, and `cost`,
        the share by which it lies above the loss at the optimum.

        Raises:
            UserError: what no results could answer.
        """
        found = self.recommend(
            architecture, params, tokens, experts=experts, top_k=top_k, group=group
        )
        rate = _numbers(learning_rate, "learning_rate")
        batch = _numbers(batch_tokens, "batch_tokens")
        rate, batch = paired(learning_rate=rate, batch_tokens=batch)
        return predict_around(self.evidence_of(found.architecture), found, rate, batch)

    def predict_runs(
        self, runs: str | PathLike[str] | pd.DataFrame, columns: Mapping[str, str] | None = None
    ) -> pd.DataFrame:
        """The expected final loss of many configurations, with 95 % intervals; see
        `prediction.predict_runs`.

        `runs` is a table with one row a configuration (CSV, JSON lines, Parquet), a DataFrame, or a
        results folder; `columns` are our columns to its own, where their names do not tell.

        Raises:
            UserError: the table will not do.
        """
        return predict_runs(self, read_runs(runs, _mapping(columns), needed=SIZED))

    def score(
        self,
        runs: str | PathLike[str] | pd.DataFrame,
        columns: Mapping[str, str] | None = None,
        *,
        where: str | None = None,
    ) -> Score:
        """The predictions of `predict_runs` against the runs' known losses.

        Raises:
            UserError: the table will not do, or no run of it can be scored.
        """
        frame = read_runs(runs, _mapping(columns))
        return score_runs(self, rows_where(frame, where) if where else frame)

    def __str__(self) -> str:
        return self.summary()

    def summary(self, everything: bool = False) -> str:
        """The laws and how they did on what was held out, as text; with `everything` the cells,
        the comparison of architectures, the prior and the checks too."""
        return summary(self, everything)


def _mapping(columns: Mapping[str, str] | None) -> str | None:
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items()) if columns else None


def _numbers(values: Many, name: str) -> np.ndarray:
    """[n] positive numbers, of numbers or of text such as "2M"."""
    each = [values] if single(values) else list(values)  # type: ignore[arg-type]
    read = np.array([read_number(scalar(v, name), name) for v in each])
    if not (np.isfinite(read) & (read > 0)).all():
        raise UserError(f"{name} must be above zero, not {values}")
    return read
