"""Arrow matrices: a head shared by all cells, and a block of each cell's own.

A trial involves the shared parameters and its own cell's, so the precision of a surface fit is such
a matrix. It is solved and inverted block by block, at a cost linear in the number of cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockArrowCovariance:
    """Blocks of a covariance: shared [S, S], shared by own [cells, S, 3], own [cells, 3, 3]."""

    shared: np.ndarray
    cross: np.ndarray
    own: np.ndarray


class Grouping:
    """Sums over the trials of each cell."""

    def __init__(self, cell: np.ndarray, cells: int) -> None:
        self._cells = cells
        self._order = np.argsort(cell, kind="stable")
        self._present, self._start = np.unique(cell[self._order], return_index=True)

    def sum(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] to [cells, ...]; a cell without trials sums to 0."""
        total = np.zeros((self._cells, *rows.shape[1:]))
        if len(self._present):
            total[self._present] = np.add.reduceat(rows[self._order], self._start, axis=0)
        return total

    def outer(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Sums of outer products of [n, a] and [n, b]: [cells, a, b]."""
        return self.sum(left[:, :, None] * right[:, None])


def damped(blocks: np.ndarray, damping: float) -> np.ndarray:
    """Square blocks [..., m, m] with their diagonals raised by a share."""
    raised = blocks.copy()
    index = np.arange(blocks.shape[-1])
    raised[..., index, index] *= 1 + damping
    return raised


def _flat(blocks: np.ndarray) -> np.ndarray:
    """[cells, S, 3] side by side: [S, 3 cells]."""
    return blocks.transpose(1, 0, 2).reshape(blocks.shape[1], -1)


def solve(
    head: np.ndarray, cross: np.ndarray, tail: np.ndarray, shared: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x of [[head, cross], [cross', tail]] x = (shared, own), by the Schur complement."""
    reduced = cross @ np.linalg.inv(tail)
    first = np.linalg.solve(
        head - _flat(reduced) @ _flat(cross).T, shared - _flat(reduced) @ own.ravel()
    )
    rest = own - (_flat(cross).T @ first).reshape(-1, 3)
    return first, np.linalg.solve(tail, rest[..., None])[..., 0]


def log_determinant(head: np.ndarray, cross: np.ndarray, tail: np.ndarray) -> float:
    """ln |determinant| of [[head, cross], [cross', tail]]."""
    reduced = cross @ np.linalg.inv(tail)
    schur = head - _flat(reduced) @ _flat(cross).T
    return float(np.linalg.slogdet(schur)[1] + np.linalg.slogdet(tail)[1].sum())


def jittered_cholesky(covariance: np.ndarray) -> np.ndarray:
    """Cholesky factor, relative jitter 1e-9 on the diagonal."""
    jitter = 1e-9 * covariance.diagonal() + 1e-18
    return np.linalg.cholesky(covariance + np.diag(jitter))


def invert(head: np.ndarray, cross: np.ndarray, tail: np.ndarray) -> BlockArrowCovariance:
    """The inverse of the arrow matrix [[head, cross], [cross', tail]], by blocks."""
    inverse = np.linalg.inv(tail)
    reduced = cross @ inverse
    shared = np.linalg.inv(head - _flat(reduced) @ _flat(cross).T)
    shared = 0.5 * (shared + shared.T)
    coupled = -shared @ reduced
    own = inverse - reduced.transpose(0, 2, 1) @ coupled
    return BlockArrowCovariance(shared, coupled, 0.5 * (own + own.transpose(0, 2, 1)))
