"""Recorded learning rate x batch grids: read, looked up at the nearest point, and smoothed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from raysweep.errors import UserError
from raysweep.results.published import read_steplaw
from raysweep.results.store import Results
from raysweep.scaling.runs import size_of
from raysweep.study.shape import RunSize

_FEW = 12  # a cell of fewer recorded runs replays nothing


@dataclass(frozen=True)
class RecordedGrid:
    """One cell's recorded runs. Points are (ln learning rate, ln batch tokens)."""

    cell: RunSize
    sequence_length: int
    point: np.ndarray  # [n, 2]
    loss: np.ndarray  # [n]; nan where the run diverged

    @property
    def bounds(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The recorded range of the learning rate and of log2 batch in sequences."""
        low, high = self.point.min(0), self.point.max(0)
        log2 = (np.array([low[1], high[1]]) - np.log(self.sequence_length)) / np.log(2)
        return (float(np.exp(low[0])), float(np.exp(high[0]))), (float(log2[0]), float(log2[1]))

    def nearest(self, point: np.ndarray) -> int:
        """The row of the recorded run nearest to a point, in logs."""
        return int(((self.point - point) ** 2).sum(1).argmin())

    @cached_property
    def gap(self) -> np.ndarray:
        """[n], relative excess over the lowest recorded loss; inf where diverged."""
        return np.nan_to_num(self.loss / np.nanmin(self.loss) - 1, nan=np.inf)

    @cached_property
    def denoised_gap(self) -> np.ndarray:
        """[n], the gap with recorded losses replaced by a smooth fit of the whole grid."""
        smooth = smooth_log_loss(self.point, self.loss)
        return np.where(np.isfinite(self.gap), np.expm1(smooth - np.nanmin(smooth)), np.inf)


def smooth_log_loss(point: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """A polynomial in (ln lr, ln batch) through ln loss near the optimum, at every point [n].

    Runs count by 1 / (0.001^2 + (0.2 gap)^2), those beyond a gap of 6 % not at all; the degree, 2
    to 5, is the one of least weighted leave-one-out error. Far points keep their recorded loss.
    """
    log_loss = np.log(loss)
    gap = log_loss - np.nanmin(log_loss)
    near = gap < 0.06
    weight = 1 / np.hypot(0.001, 0.2 * gap[near])
    centred = point - point[near].mean(0)
    best, smooth = np.inf, log_loss
    for degree in range(2, 6):
        powers = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
        if near.sum() < 1.5 * len(powers):
            break
        columns = np.column_stack([centred[:, 0] ** i * centred[:, 1] ** j for i, j in powers])
        q, r = np.linalg.qr(columns[near] * weight[:, None])
        target = log_loss[near] * weight
        fitted = q @ (q.T @ target)
        left_out = (target - fitted) / (1 - (q**2).sum(1)).clip(1e-6)
        error = float((left_out**2).mean())
        if error < best:
            best = error
            smooth = np.where(near, columns @ np.linalg.solve(r, q.T @ target), log_loss)
    return smooth


def read_grids(uri: str) -> list[RecordedGrid]:
    """Grids of a results folder (any URI) or of a Step Law CSV, in order of compute."""
    frame = read_steplaw(uri) if uri.endswith(".csv") else Results.open(uri).to_pandas()
    frame = frame[frame["status"].isin(["finished", "diverged"])]
    grids = []
    for name, rows in frame.groupby("cell"):
        lost = (rows["status"] == "diverged").to_numpy()
        loss = np.where(lost, np.nan, rows["loss"].to_numpy(dtype=float))
        if len(rows) < _FEW or np.isfinite(loss).sum() < _FEW:
            continue
        first = rows.iloc[0]
        grids.append(
            RecordedGrid(
                cell=replace(size_of(name, first), flops=np.nan),  # it may not have come to its end
                sequence_length=int(first["sequence_length"]),
                point=np.log(rows[["learning_rate", "batch_tokens"]].to_numpy(dtype=float)),
                loss=loss,
            )
        )
    if not grids:
        raise UserError(f"{uri}: no cell has {_FEW} or more finished runs to replay")
    return sorted(grids, key=lambda grid: grid.cell.compute)
