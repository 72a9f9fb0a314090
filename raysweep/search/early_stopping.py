"""Stopping poor trials on partial losses: an Optuna pruner a cell.

Off unless asked for. Under a schedule that decays, a run with a small learning rate is behind
early and catches up, one with a large rate falls most during the decay: partial losses rank runs
otherwise than final ones, and the optimum found is biased by it. What can be done is done: only
trials of one cell are compared, at equal shares of the horizon, after a grace period.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysweep.study.trials import EarlyStopping

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

REPORT_PERCENT = 5
"""Trials report at multiples of this share of their horizon, in per cent."""


def make_pruner(settings: EarlyStopping | None) -> BasePruner:
    """The pruner of a cell's study; its resource is the percentage of the horizon.

    `asha` is asynchronous successive halving (Li et al. 2018, arXiv 1810.05934): a trial goes on
    past a rung if it is in the best 1/reduction_factor of those that reached it. `median` stops
    what is worse than the median of earlier trials at the same share (Golovin et al. 2017).
    """
    # Here: each worker of a study needs the number above, and none the 0.3 s of Optuna.
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    if settings is None:
        return NopPruner()
    grace = max(REPORT_PERCENT, round(100 * settings.grace_fraction))
    if settings.method == "median":
        return MedianPruner(n_startup_trials=3, n_warmup_steps=grace - 1)
    return SuccessiveHalvingPruner(
        min_resource=grace, reduction_factor=max(2, round(settings.reduction_factor))
    )
