"""The largest cells, predicted by a fit of the smaller ones: how far an extrapolation holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.scaling.cells import CellTrials
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import Evidence, gather
from raysweep.scaling.optima.literature import OptimumPrior

TRAIN_SHARE = 0.6
"""Share of cells, smallest compute first, that a held-out check is fitted on."""

NEAR = 0.5
"""A recorded trial this close (ln units) to a prediction may stand for it."""

MIN_TRAIN = 3


@dataclass(frozen=True)
class HeldOutCell:
    """One cell as a fit of smaller ones predicts it, and as its own trials tell it."""

    cell: str
    learning_rate: Estimate
    batch_tokens: Estimate
    loss: Estimate
    read_learning_rate: float
    read_batch_tokens: float
    read_loss: float
    regret: float
    """Loss of the recorded trial nearest to the prediction over the cell's best, less 1; NaN
    where none is near."""


@dataclass(frozen=True)
class HeldOut:
    """The cells that were held out, and how many smaller ones the fit saw."""

    cells: tuple[HeldOutCell, ...]
    n_train: int

    def covered(self, quantity: str) -> tuple[int, int]:
        """In how many held-out cells the 95 % interval of `learning_rate`, `batch_tokens` or
        `loss` holds what their own trials tell, and of how many."""
        both = [(getattr(c, quantity), getattr(c, f"read_{quantity}")) for c in self.cells]
        known = [(e, read) for e, read in both if e.has_interval and math.isfinite(read)]
        return sum(e.covers(read) for e, read in known), len(known)

    @property
    def mean_regret(self) -> float:
        """Over the cells where a trial lies near the prediction; NaN without one."""
        known = [c.regret for c in self.cells if math.isfinite(c.regret)]
        return float(np.mean(known)) if known else math.nan


def hold_out_largest(
    evidence: Sequence[Evidence], trials: Sequence[CellTrials], prior: OptimumPrior
) -> HeldOut | None:
    """Fit the smaller cells of each set of data, predict the larger; None where they are too
    few."""
    found: list[HeldOutCell] = []
    seen = 0
    for one in evidence:
        own = [t for t in trials if t.name in one.cells.index]
        order = [name for name in one.cells.index if any(t.name == name for t in own)]
        n_train = math.ceil(TRAIN_SHARE * len(order))
        small, large = order[:n_train], order[n_train:]
        if one.surface is None or n_train < MIN_TRAIN or not large:
            continue
        by_name = {t.name: t for t in own}
        fitted = gather(one.dataset, one.cells.loc[small], [by_name[str(n)] for n in small], prior)
        seen += n_train
        found += [_predicted(one, fitted, by_name[str(name)]) for name in large]
    return HeldOut(tuple(found), seen) if found else None


def _predicted(whole: Evidence, fitted: Evidence, trials: CellTrials) -> HeldOutCell:
    run = whole.sizes[trials.name]
    optimum = fitted.optimum(run)
    read = whole.optimum(run)
    assert optimum is not None
    assert read is not None
    rate, batch = optimum.estimates()
    away = np.hypot(
        np.log(trials.learning_rate) - optimum.mean[0],
        np.log(trials.batch_tokens) - optimum.mean[1],
    )
    nearest = int(away.argmin())
    regret = float(trials.loss[nearest] / trials.loss.min() - 1)
    architecture = str(whole.cells["architecture"].to_dict()[trials.name])
    known = architecture in fitted.architectures
    loss = fitted.loss(architecture, run).loss if known else Estimate.missing("not seen")
    return HeldOutCell(
        cell=trials.name,
        learning_rate=rate,
        batch_tokens=batch,
        loss=loss,
        read_learning_rate=read.learning_rate,
        read_batch_tokens=read.batch_tokens,
        read_loss=whole.losses[trials.name][0],
        regret=regret if away[nearest] <= NEAR else math.nan,
    )
