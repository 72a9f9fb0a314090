"""An optimum: what is known of where one cell's loss is least, and the word for how it is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysweep.scaling.cells import CellTrials

INTERIOR, FLAT, TOO_FEW = "interior", "flat", "too few trials"


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where one cell's loss is least.

    `covariance` [2, 2] is that of (ln learning_rate, ln batch_tokens), NaN where the trials do not
    identify it. `own` [2] and `own_covariance` [2, 2], in the same logs, are what the cell's own
    trials say of its place, for laws over cells: where cells borrow from each other's law, the
    optimum leans on that law, and a law fitted to such optima would confirm itself. `status` is
    `interior`, `flat`, `too few trials`, or `edge: ` with the sides, as in
    `edge: learning_rate high, batch low`. Batch in tokens, loss in nats a token.
    """

    cell: str
    learning_rate: float
    batch_tokens: float
    loss: float
    covariance: np.ndarray
    loss_se: float
    status: str
    method: str
    n_trials: int
    own: np.ndarray
    own_covariance: np.ndarray

    @property
    def interior(self) -> bool:
        return self.status == INTERIOR

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "cell": self.cell,
            "learning_rate": self.learning_rate,
            "batch_tokens": self.batch_tokens,
            "loss": self.loss,
            "loss_se": self.loss_se,
            "covariance": self.covariance.tolist(),
            "status": self.status,
            "method": self.method,
            "n_trials": self.n_trials,
        }


def log_trials(trials: CellTrials) -> tuple[np.ndarray, np.ndarray]:
    """(ln learning rate, ln batch) [n, 2] and ln loss [n]."""
    point = np.column_stack([np.log(trials.learning_rate), np.log(trials.batch_tokens)])
    return point, np.log(trials.loss)


def searched_range(trials: CellTrials) -> tuple[np.ndarray, np.ndarray]:
    """The searched range in logs; a diverged trial bounds it as well as a finished one."""
    rate = np.concatenate([trials.learning_rate, trials.failed_learning_rate])
    batch = np.concatenate([trials.batch_tokens, trials.failed_batch_tokens])
    return (
        np.log([rate.min(), batch.min()]),
        np.log([rate.max(), batch.max()]),
    )


def edges_met(where: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """`edge: ...` where a point lies on or beyond the border of the searched range, else ""."""
    sides = []
    for k, name in enumerate(("learning_rate", "batch")):
        slack = 1e-6 * (high[k] - low[k])
        if high[k] <= low[k]:
            continue  # one value only: nothing was searched, so there is no border to meet
        if where[k] <= low[k] + slack:
            sides.append(f"{name} low")
        elif where[k] >= high[k] - slack:
            sides.append(f"{name} high")
    return "edge: " + ", ".join(sides) if sides else ""


def optimum_at(
    trials: CellTrials,
    method: str,
    where: np.ndarray,
    log_loss: float,
    covariance: np.ndarray,
    log_loss_sd: float,
    unclipped: np.ndarray | None = None,
) -> Optimum:
    """An optimum with its status: flat before edge before interior."""
    low, high = searched_range(trials)
    edge = edges_met(where if unclipped is None else unclipped, low, high)
    width = high - low
    searched = width > 0
    covariance = np.array(covariance, dtype=float)
    sd = np.sqrt(np.diag(covariance))
    blind = bool((sd[searched] > width[searched] / 2).all()) if searched.any() else True
    same = float(np.ptp(np.log(trials.loss))) < 1e-9
    status = FLAT if same or blind else edge or INTERIOR
    for k, name in enumerate(("learning_rate", "batch")):
        if not searched[k] or status == FLAT or f"{name} low" in status or f"{name} high" in status:
            covariance[k, :] = covariance[:, k] = np.nan
    loss = float(np.exp(log_loss))
    return Optimum(
        cell=trials.name,
        learning_rate=float(np.exp(where[0])),
        batch_tokens=float(np.exp(where[1])),
        loss=loss,
        covariance=covariance,
        loss_se=loss * float(log_loss_sd),
        status=status,
        method=method,
        n_trials=len(trials.loss),
        own=np.array(where, dtype=float),
        own_covariance=covariance,
    )


def best_trial(trials: CellTrials, method: str, status: str) -> Optimum:
    """The best trial, with nothing known about how near the optimum it is."""
    best = int(trials.loss.argmin())
    return Optimum(
        cell=trials.name,
        learning_rate=float(trials.learning_rate[best]),
        batch_tokens=float(trials.batch_tokens[best]),
        loss=float(trials.loss[best]),
        covariance=np.full((2, 2), np.nan),
        loss_se=float("nan"),
        status=status,
        method=method,
        n_trials=len(trials.loss),
        own=np.log([trials.learning_rate[best], trials.batch_tokens[best]]),
        own_covariance=np.full((2, 2), np.nan),
    )
