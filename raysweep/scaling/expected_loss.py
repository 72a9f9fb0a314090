"""The loss a run should reach: which law tells it, how sure, and what is to be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from raysweep.scaling.groups import ALL, Group
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.selection import predict_loss
from raysweep.scaling.target import ComputePath

if TYPE_CHECKING:
    from raysweep.scaling.fits import Fits


@dataclass(frozen=True)
class ExpectedLoss:
    """The loss a run should reach, by which law, and what is to be said of it."""

    law: str
    value: float
    interval: tuple[float, float]
    rests_on: tuple[str, ...]
    warnings: tuple[str, ...]


def expected_loss(
    fits: Fits, own: Group, foreign: bool, inputs: Mapping[str, float]
) -> ExpectedLoss:
    """By the law asked for, else the one that best predicted the highest compute: of the
    architecture alone, then of all together."""
    groups = [] if foreign else [own]
    groups += [fits.groups[ALL]] if ALL in fits.groups else []
    why = ""
    for group in groups:
        order = loss_laws_asked(fits, group)
        blind = {key for key in order if "params" not in LOSS_LAWS[key].inputs}
        if blind and not (path := ComputePath.of(group.cells)).near(inputs):
            order = [key for key in order if key not in blind]
            asked = inputs["tokens"] / inputs["params_active_non_embedding"]
            why = (
                f": one in compute alone knows about {path.expected(inputs):.2g} tokens a "
                f"parameter at this compute, and {asked:.2g} were asked for"
            )
        found = predict_loss(group.loss_laws, order, inputs)
        if found is None:
            continue
        key, value, low, high = found
        check, fitted = group.loss_checks.get(key), group.loss_laws[key]
        said = f"loss by the law '{key}' on {int(group.cells['loss'].count())} cells"
        if check is not None and math.isfinite(check.error):
            said += f", {100 * check.error:.2f} % off on the highest compute unseen"
        warnings = []
        untuned = _untuned(group.cells)
        if untuned:
            warnings.append(
                f"{untuned} of {len(group.cells)} cells have no interior optimum: the loss of "
                "their best trial stands for them, and the expected loss may be too high for it"
            )
        if fitted.status == "at bound":
            warnings.append(f"the law of the loss is not certain: {fitted.message}")
        if isinstance(fitted, LossFit) and fitted.fixed:
            warnings.append(
                "three cells: the law of the loss has no floor, so it is too low far out"
            )
        return ExpectedLoss(key, value, (low, high), (said,), tuple(warnings))
    if not why and own.mixes_experts:
        why = ": the cells differ in experts, and no law that reads them could be fitted"
    nothing = (f"no law of the loss can predict this run's{why}",)
    return ExpectedLoss("", math.nan, (math.nan, math.nan), (), nothing)


def loss_laws_asked(fits: Fits, group: Group) -> list[str]:
    """The laws of the loss that may answer for a group, in the order in which they are asked."""
    order = [key for key in (fits.loss_law,) if key] + group.loss_order()
    if group.mixes_experts:
        return [key for key in order if {"experts", "sparsity"} & set(LOSS_LAWS[key].inputs)]
    return order


def _untuned(cells: pd.DataFrame) -> int:
    """Searched cells whose loss is their best trial's, not that of an optimum."""
    searched = cells["learning_rate"].notna()
    return int((searched & (cells["loss_from"] == "best trial")).sum())
