"""The laws of the loss as the page's calculator takes them, with all that is said of them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from raysweep.report.trends import PARAMS
from raysweep.scaling.expected_loss import expected_loss, loss_laws_asked
from raysweep.scaling.fits import Fits
from raysweep.scaling.groups import Group
from raysweep.scaling.loss.data import STAND_INS
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.target import ComputePath, describe_target

SAMPLE_DIGITS = 8
"""Significant digits of resampled coefficients."""

KNOWN_INPUTS = {"params", "tokens", "flops", "experts", "sparsity"}
"""Inputs of a law of the loss that are known of a run asked about."""


def losses(fits: Fits, group: Group) -> list[dict[str, Any]]:
    """The laws of the loss that answer for a group, with their resamples: the first that knows a
    run's parameters, and those before it, which know its compute alone."""
    found = []
    for key in loss_laws_asked(fits, group):
        fit = group.loss_laws.get(key)
        if not isinstance(fit, LossFit) or not fit.ok:
            continue
        inputs = set(LOSS_LAWS[key].inputs)
        if not inputs <= KNOWN_INPUTS:
            continue
        count = _count(group.cells, fit.law.parameter_count)
        if "params" in inputs and count is None:
            continue
        knows = "params" in inputs
        path = None if knows else asdict(ComputePath.of(group.cells))
        said = {"path": path, "cautions": _cautions(fits, group, key)}
        found.append({**_loss_law(fit, count), **said})
        if knows:
            break
    return found


def no_loss(fits: Fits, group: Group) -> dict[str, Any]:
    """What `expected_loss` says where no law answers: of a run as such, and of one that lies off
    the compute path of laws that know nothing else (None where there are none of them)."""
    # Asked of the group with no law, then with the blind ones alone, by themselves.
    mute = replace(group, loss_laws={}, loss_checks={})
    blind = [k for k in loss_laws_asked(fits, group) if "params" not in LOSS_LAWS[k].inputs]
    alone = replace(fits, groups={}, loss_law=None)
    plain = expected_loss(alone, mute, False, _run(group)).warnings[0]
    if not blind:
        return {"plain": plain, "off_path": None}
    path = ComputePath.of(group.cells)
    off = _near_path(group, times=1e3 * math.exp(path.tolerance))
    only = replace(
        group, loss_checks={k: group.loss_checks[k] for k in blind if k in group.loss_checks}
    )
    text = expected_loss(alone, only, False, off).warnings[0]
    # The sentence with its blanks put back where this run's numbers stand.
    numbers = {"expected": path.expected(off), "asked": off["tokens"] / off[PARAMS]}
    for name, value in numbers.items():
        text = text.replace(f"{value:.2g}", f"{{{name}}}", 1)
    return {"plain": plain, "off_path": {"path": asdict(path), "text": text}}


def _cautions(fits: Fits, group: Group, key: str) -> list[str]:
    """What `expected_loss` says whenever this law answers: asked of a run where it does."""
    found = expected_loss(replace(fits, loss_law=key), group, False, _near_path(group))
    assert found.law == key
    return list(found.warnings)


def _run(group: Group) -> dict[str, float]:
    return describe_target(group.cells, 1e6, 1e6, 1, 1).inputs


def _near_path(group: Group, times: float = 1.0) -> dict[str, float]:
    """A run with `times` the tokens that the cells have at its compute."""
    inputs = _run(group)
    expected = ComputePath.of(group.cells).expected(inputs)
    return {**inputs, "tokens": times * expected * inputs[PARAMS]}


def _count(cells: pd.DataFrame, wanted: str) -> str | None:
    """The count that stands for a law's N, as `predict_loss` chooses it."""
    inputs = describe_target(cells, 1e6, 1e6, 1, 1).inputs
    for name in (wanted, STAND_INS.get(wanted, wanted)):
        if math.isfinite(inputs.get(name, math.nan)):
            return name
    return None


def _loss_law(fit: LossFit, count: str | None) -> dict[str, Any]:
    expression = fit.law.expression
    samples = fit.samples if fit.samples is not None and len(fit.samples) > 1 else None
    rows = fit.values[None] if samples is None else np.vstack([fit.values, samples])
    noise = None
    if samples is not None:
        # A new run strays from the law as the fitted cells do: the same draws as LossFit.interval.
        spread = fit.residuals * math.sqrt(fit.n_points / max(fit.n_points - fit.n_free, 1))
        noise = np.random.default_rng(0).choice(spread, size=(len(samples), 1))[:, 0]
        noise = [_short(v) for v in noise]
    return {
        "law": fit.name,
        "formula": fit.law.formula,
        "status": fit.status,
        "count": count,
        "names": list(expression.names),
        "kinds": [c.kind for c in expression.coefficients],
        "terms": [
            {"amplitude": t.amplitude, "powers": [_power(p) for p in t.powers]}
            for t in expression.terms
        ],
        "interaction": [_power(p) for p in expression.interaction],
        "rows": [rows[0].tolist(), *([_short(v) for v in row] for row in rows[1:])],
        "noise": noise,
        "cells": fit.n_cells,
    }


def _short(value: float) -> float:
    return float(f"{value:.{SAMPLE_DIGITS}g}")


def _power(power: Any) -> dict[str, Any]:
    return {
        "coefficient": power.coefficient,
        "symbols": power.symbols.split(),
        "scale": power.scale,
    }
