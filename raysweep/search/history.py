"""The history that all cells of a study share: from their Optuna studies and imported rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from raysweep.errors import UserError
from raysweep.scaling.optima.hyperparameters import Points, points_of
from raysweep.scaling.optima.literature import OptimumPrior
from raysweep.scaling.optima.surface import Surface, fit_surface
from raysweep.study.shape import RunSize

LEARNING_RATE = "learning_rate"
LOG2_BATCH = "log2_batch_sequences"

_FEW = 60  # trials up to which every fit starts anew, a function of the trials alone


@dataclass(frozen=True)
class CellTrials:
    """Trials of one cell as arrays of equal length; `diverged` ones have a loss of nan."""

    learning_rate: np.ndarray
    batch_tokens: np.ndarray
    loss: np.ndarray
    diverged: np.ndarray


@dataclass(frozen=True)
class _Outcome:
    learning_rate: float
    log2_batch: float
    loss: float
    moved: tuple[float, float]  # from where it was asked to run, in ln learning rate and ln batch
    params: dict[str, Any]  # as Optuna knows them, further hyperparameters included


@dataclass
class _CellRecord:
    cell: RunSize
    study: optuna.Study | None = None
    sequence_length: int = 0
    imported: list[CellTrials] = field(default_factory=list)
    told: dict[int, _Outcome | None] = field(default_factory=dict)  # of ended trials, by number

    def outcomes(self) -> list[_Outcome]:
        """What the study's ended trials told, by number; each is read once."""
        for trial in _trials(self.study):
            if trial.number not in self.told and trial.state.is_finished():
                self.told[trial.number] = _outcome(trial)
        return [told for _, told in sorted(self.told.items()) if told is not None]


class TrialHistory:
    """What every cell of a study knows, for samplers that learn across cells.

    Each cell is registered with its Optuna study; trials are read from the studies when asked for,
    so a study rebuilt with `study.add_trial` teaches as a live one does. COMPLETE trials give their
    loss; FAIL trials whose user attribute "status" is "diverged" tell that the loss there is high;
    any other failure tells nothing; RUNNING ones are pending. A trial that ran elsewhere than it
    was asked to says so in the user attribute "ran_at": (learning rate, log2 batch in sequences);
    one whose parameters are not what was asked for, in "asked_at".
    """

    def __init__(self, prior: OptimumPrior | None = None) -> None:
        self.prior = prior
        self._entries: dict[str, _CellRecord] = {}
        self._cache: tuple[int, Surface] | None = None
        self._full_fit = 0  # trials of the last fit from several starts

    def register(self, cell: RunSize, study: optuna.Study, *, sequence_length: int) -> None:
        """Add a cell, or replace its study. `sequence_length` is in tokens."""
        entry = self._entry(cell)
        if entry.study is not study:
            entry.told.clear()
        entry.study, entry.sequence_length = study, sequence_length

    def add_imported(
        self,
        cell: RunSize,
        learning_rate: np.ndarray,
        batch_tokens: np.ndarray,
        loss: np.ndarray,
        diverged: np.ndarray | None = None,
    ) -> None:
        """Add imported rows. A loss that is not finite and positive counts as diverged."""
        loss = np.asarray(loss, dtype=float)
        lost = ~((loss > 0) & (loss < np.inf))
        if diverged is not None:
            lost = lost | np.asarray(diverged, dtype=bool)
        rows = CellTrials(
            np.asarray(learning_rate, dtype=float),
            np.asarray(batch_tokens, dtype=float),
            np.where(lost, np.nan, loss),
            lost,
        )
        if not rows.learning_rate.shape == rows.batch_tokens.shape == loss.shape:
            raise UserError(f"history of cell {cell.name!r}: columns differ in length")
        self._entry(cell).imported.append(rows)

    @property
    def cells(self) -> tuple[RunSize, ...]:
        """All cells, in the order they came."""
        return tuple(entry.cell for entry in self._entries.values())

    def trials_of(self, name: str) -> CellTrials:
        """Finished and diverged trials of one cell: imported rows, then the study's, by number."""
        entry = self._known(name)
        rows = [
            (
                told.learning_rate,
                2.0**told.log2_batch * entry.sequence_length,
                told.loss,
                not np.isfinite(told.loss),
            )
            for told in entry.outcomes()
        ]
        own = np.array(rows, dtype=float).reshape(-1, 4)
        live = CellTrials(own[:, 0], own[:, 1], own[:, 2], own[:, 3] > 0)
        parts = [*entry.imported, live]
        return CellTrials(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("learning_rate", "batch_tokens", "loss", "diverged")
            )
        )

    def pending(self, name: str, besides: int | None = None) -> np.ndarray:
        """(ln learning rate, ln batch tokens) of running trials of one cell, but one, [n, 2]."""
        entry = self._known(name)
        places = [
            where_run(trial)
            for trial in _trials(entry.study, TrialState.RUNNING)
            if trial.number != besides
        ]
        points = [
            (np.log(p[0]), p[1] * np.log(2) + np.log(entry.sequence_length))
            for p in places
            if p is not None
        ]
        return np.array(points, dtype=float).reshape(-1, 2)

    def further(self, name: str) -> Points:
        """What the studies' finished trials tell of a further hyperparameter."""
        rows = [
            (told.learning_rate, 2.0**told.log2_batch * e.sequence_length, told.loss, value, cell)
            for cell, e in self._entries.items()
            for told in e.outcomes()
            if (value := told.params.get(name)) is not None
        ]
        numbers = np.array([row[:4] for row in rows], dtype=float).reshape(-1, 4)
        return points_of(self.surface(), [row[4] for row in rows], *numbers.T)

    def granularity(self) -> np.ndarray:
        """[2], rms distance of where trials ran from where they were asked to, in ln units."""
        moved = [told.moved for entry in self._entries.values() for told in entry.outcomes()]
        return np.sqrt(np.mean(np.square(moved), axis=0)) if moved else np.zeros(2)

    def surface(self) -> Surface:
        """The surface fitted to all that is known now; kept while nothing is new.

        Up to `_FEW` trials, and whenever there are a tenth more than at the last such fit, it is
        fitted from several starts; else the mode of the last fit is followed.
        """
        histories = [self.trials_of(name) for name in self._entries]
        index = np.repeat(np.arange(len(histories)), [len(h.loss) for h in histories])
        arrays = [
            np.concatenate([getattr(h, name) for h in histories])
            for name in ("learning_rate", "batch_tokens", "loss", "diverged")
        ]
        key = hash((self.cells, index.tobytes(), *(a.tobytes() for a in arrays)))
        if self._cache is None or self._cache[0] != key:
            followed = self._cache[1] if self._cache and len(index) > _FEW else None
            if len(index) >= 1.1 * self._full_fit or len(index) < self._full_fit:
                followed = None
            surface = fit_surface(
                self.cells,
                index,
                *arrays,
                prior=self.prior,
                batch_searched=True,
                warm=followed,
            )
            self._full_fit = len(index) if followed is None else self._full_fit
            self._cache = key, surface
        return self._cache[1]

    def _entry(self, cell: RunSize) -> _CellRecord:
        entry = self._entries.setdefault(cell.name, _CellRecord(cell))
        if entry.cell != cell:
            raise UserError(f"cell {cell.name!r} is already known with other sizes")
        return entry

    def _known(self, name: str) -> _CellRecord:
        if name not in self._entries:
            raise UserError(f"cell {name!r} is not registered here: call register first")
        return self._entries[name]


def where_run(trial: FrozenTrial) -> tuple[float, float] | None:
    """(learning rate, log2 batch in sequences) of a trial; None while it has no parameters."""
    if "ran_at" in trial.user_attrs:
        learning_rate, log2_batch = trial.user_attrs["ran_at"]
        return float(learning_rate), float(log2_batch)
    if LEARNING_RATE not in trial.params or LOG2_BATCH not in trial.params:
        return None
    return float(trial.params[LEARNING_RATE]), float(trial.params[LOG2_BATCH])


def _outcome(trial: FrozenTrial) -> _Outcome | None:
    """What an ended trial tells, with nan for the loss of a diverged one; None for nothing."""
    place = where_run(trial)
    lost = trial.state == TrialState.FAIL and trial.user_attrs.get("status") == "diverged"
    if place is None or not (lost or trial.state == TrialState.COMPLETE):
        return None
    params = trial.params.get(LEARNING_RATE, place[0]), trial.params.get(LOG2_BATCH, place[1])
    asked = trial.user_attrs.get("asked_at", params)
    moved = math.log(place[0] / asked[0]), (place[1] - asked[1]) * math.log(2)
    loss = math.nan if lost or trial.value is None else trial.value
    return _Outcome(*place, loss, moved, trial.params)


def _trials(study: optuna.Study | None, state: TrialState | None = None) -> list[FrozenTrial]:
    if study is None:
        return []
    return study.get_trials(deepcopy=False, states=None if state is None else (state,))
