"""A cell's optimum on the surface without what it borrowed from the law of the other cells."""

from __future__ import annotations

import numpy as np

from raysweep.scaling.surface import Surface

VAGUE = 0.02
"""Least precision that a cell's own trials are granted, as a share of that of the law's spread."""


def unpooled_optimum(surface: Surface, cell: str) -> tuple[np.ndarray, np.ndarray]:
    """What a cell's own trials say of its optimum: (ln learning rate, ln batch) [2], covariance
    [2, 2].

    The posterior of a cell's shift off the law, given law and valley, has the precision
    P = P_trials + P_prior and the mean m; the prior is centred, so P_trials m_trials = P m. Taking
    the prior away leaves an estimate that owes the law nothing, as a regression over cells needs.
    """
    index = [c.name for c in surface.cells].index(cell)
    mode, blocks = surface.mode, surface.mode.covariance
    cross = blocks.cross[index]  # [S, 3] of (level, shift in lr, shift in batch)
    given_shared = blocks.own[index] - cross.T @ np.linalg.solve(blocks.shared, cross)
    precision = np.linalg.inv(given_shared)
    prior = 1 / mode.widths.own**2
    # The level is a nuisance: keep its prior, integrate it out.
    trials = precision - np.diag([0.0, *prior[1:]])
    head = trials[1:, 1:] - np.outer(trials[1:, 0], trials[0, 1:]) / trials[0, 0]
    pull = precision @ mode.own[index]
    pull = pull[1:] - trials[1:, 0] * pull[0] / trials[0, 0]
    values, vectors = np.linalg.eigh((head + head.T) / 2)
    values = np.maximum(values, VAGUE * prior[1:].min())
    shift = vectors @ ((vectors.T @ pull) / values)
    posterior = surface.optimum(cell)
    law = posterior.mean - mode.own[index][1:]
    return law + shift, (vectors / values) @ vectors.T
