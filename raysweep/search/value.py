"""What one more trial in a cell is worth: how much surer it makes the recommendation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raysweep.scaling.optima.surface import Surface
from raysweep.study import Study
from raysweep.study.shape import RunSize

_DRAWS = 256
_STEPS = (-0.7, 0.0, 0.7)
_OFFSETS = np.array([(u, v) for u in _STEPS for v in _STEPS])
"""Where a trial may go, about the cell's expected optimum, in ln learning rate and ln batch."""
_REACH = 10.0
"""Without targets: a run this much larger than the largest cell, in parameters and in tokens."""


def targets_of(study: Study) -> tuple[RunSize, ...]:
    """The runs that a study is to recommend for, as the surface model sees them.

    Those that the file names; without any, each architecture's largest cell times ten in parameters
    and tokens. A MoE target is as sparse as the study's largest cell of its architecture.
    """
    largest = {cell.architecture: cell.size for cell in study.cells}
    named = [(t.architecture, t.params, t.tokens) for t in study.space.targets]
    if not named:
        named = [
            (a, c.params_active_non_embedding * _REACH, c.tokens * _REACH)
            for a, c in largest.items()
        ]
    found = []
    for i, (architecture, params, tokens) in enumerate(named):
        like = largest[architecture]
        found.append(
            RunSize(
                params_active_non_embedding=params,
                tokens=tokens,
                experts=like.experts,
                top_k=like.top_k,
                params_total_non_embedding=params * math.exp(like.log_sparsity),
                name=f"target-{i}",
            )
        )
    return tuple(found)


def trial_value(
    surface: Surface, cell: RunSize, targets: Sequence[RunSize], seed: int = 0
) -> float:
    """Expected fall of the targets' expected loss gap (relative loss) by one trial in `cell`.

    The recommendation at a target comes from the laws alone. A trial's outcome is correlated with
    the laws over joint posterior draws; a linear update on it takes that share of their variance
    away, and half the Hessian of ln loss turns variance into gap. The best of nine places about the
    cell's expected optimum counts.
    """
    points = surface.optimum(cell).mean + _OFFSETS
    draws = surface.sample_cell(cell, points, _DRAWS, np.random.default_rng(seed))
    gaps = np.minimum(draws.gaps, surface.settings.far)
    outcome = draws.levels[:, None] + gaps
    outcome = outcome - outcome.mean(0)
    variance = (outcome**2).mean(0) + surface.noise_variance(gaps.mean(0))
    design = surface.design.matrix(targets)
    predicted = np.einsum("nak,tk->nta", draws.laws, design)
    predicted = predicted - predicted.mean(0)
    covariance = np.einsum("nta,np->tap", predicted, outcome) / _DRAWS
    half = np.stack([0.5 * surface.optimum(target).curvature for target in targets])
    falls = np.einsum("tap,tab,tbp->p", covariance, half, covariance) / variance / len(targets)
    return float(falls.max())
