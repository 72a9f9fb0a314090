"""What the page's calculator computes with: every coefficient behind `Fits.recommend`, as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from raysweep.report.calculator_loss import losses, no_loss
from raysweep.report.reading import INSIDE, NO_INTERVAL
from raysweep.report.trends import FLOPS, PARAMS, TOKENS, names_of
from raysweep.scaling import cautions
from raysweep.scaling.advise import SURFACE_CELLS
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.groups import Group
from raysweep.scaling.optima_laws import KNOWN_AHEAD, best_law
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.published import PUBLISHED_LAWS, PublishedLaw, Setting
from raysweep.scaling.quantities import SEARCHED
from raysweep.scaling.surface import CellFeatures, Surface
from raysweep.scaling.target import describe_target, expert_share

DIGITS = 12
"""Significant digits of coefficients: answers are compared at four."""

RANGES = {"params": PARAMS, "tokens": TOKENS, "FLOPs": FLOPS}


def calculator(fits: Fits) -> dict[str, Any] | None:
    """Everything that the page needs to answer as `fits.recommend` does; None if nothing can."""
    names = [n for n in names_of(fits) if len(fits.groups[n].cells)]
    if not names:
        return None
    groups = [*names, ALL] if ALL in fits.groups else names
    described = {name: _group(fits, fits.groups[name]) for name in groups}
    surface = _surface(fits)
    lawless = all(not any(g["laws"].values()) and not g["losses"] for g in described.values())
    if lawless and (surface is None or not any(surface["sides"].values())):
        return None
    data = {
        "architectures": names,
        "all": ALL,
        "far": cautions.FAR,
        "words": {**cautions.WORDS, "inside": INSIDE, "no_interval": NO_INTERVAL},
        "split_margin": cautions.SPLIT_MARGIN,
        "compute_loss": cautions.COMPUTE_LOSS,
        "groups": described,
        "surface": surface,
        "published": [law for p in PUBLISHED_LAWS.values() if (law := _published(p)) is not None],
    }
    return _rounded(data)


def _group(fits: Fits, group: Group) -> dict[str, Any]:
    cells = group.cells
    pairs = cells[["experts", "top_k"]].drop_duplicates().astype(int).to_numpy().tolist()
    length = cells["sequence_length"].dropna()
    return {
        "kind": group.kind,
        "pairs": pairs,
        "sequence_length": int(length.mode().iloc[0]) if len(length) else None,
        "family": _family(cells),
        "range": _range(cells),
        "laws": {q: _laws(group, q) for q in SEARCHED},
        "losses": losses(fits, group),
        # Why nothing answers, where nothing does.
        "no_law": {q: cautions.no_law(group, q) for q in SEARCHED},
        "no_loss": no_loss(fits, group),
    }


def _family(cells: pd.DataFrame) -> dict[str, Any]:
    """What `describe_target` takes from the cells of a family."""
    example = describe_target(cells, 1e6, 1e6, 1, 1).inputs
    exact = cells[cells["flops_exact"]]
    slope, intercept = 1.0, math.log(6.0)
    if len(exact):
        n = np.log(exact[PARAMS].to_numpy(float))
        f = np.log(exact["flops_per_token"].to_numpy(float))
        intercept = float(f.mean() - n.mean())
        if np.ptp(n) >= 1e-9:
            slope, intercept = (float(v) for v in np.polyfit(n, f, 1))
    share = expert_share(cells)
    return {
        "share": 2 / 3 if share is None else share,
        "notes": {
            kind: list(describe_target(cells, 1e6, 1e6, experts, 1).notes)
            for kind, experts in (("dense", 1), ("moe", 2))
        },
        # Embeddings grow with N^(1/3): their number at N = 1.
        "embedding": (example["params_active"] - 1e6) / 1e6 ** (1 / 3),
        "head": example["head_params"] / 1e6 ** (1 / 3),
        "dense": example["params_dense"] / 1e6,
        "flops": [intercept, slope],
    }


def _range(cells: pd.DataFrame) -> dict[str, list[float]]:
    columns = {name: cells[column] for name, column in RANGES.items()}
    columns["ratio"] = cells[TOKENS] / cells[PARAMS]
    return {name: [float(v.min()), float(v.max())] for name, v in columns.items()}


def _laws(group: Group, quantity: str) -> list[dict[str, Any]]:
    """The group's laws of a quantity in the order in which they are asked."""
    laws = {
        name: law
        for name, law in group.laws.items()
        if not group.wants_routing or {"active_ratio", "experts"} & set(law.inputs)
    }
    ordered = []
    while (law := best_law(laws, quantity, KNOWN_AHEAD)) is not None:
        ordered.append(_law(law, group.cells))
        del laws[law.name]
    return ordered


def _law(law: PowerLaw, cells: pd.DataFrame) -> dict[str, Any]:
    used = cells.loc[[c for c in law.cells if c in cells.index]]
    near = {}
    if "params" not in law.inputs:
        for column in (PARAMS, TOKENS):
            logs = np.log(used[column].to_numpy(float))
            if np.ptp(logs) < 0.1:  # it speaks of this one size (or horizon) only
                near[column] = float(logs.mean())
    centre = [math.log(law.centre[name]) for name in law.inputs]
    exponents = [law.exponents[name].value for name in law.inputs]
    return {
        "name": law.name,
        "formula": law.formula,
        "inputs": list(law.inputs),
        "count": law.count,
        "centre": centre,
        "theta": [math.log(law.coefficient.value) + float(np.dot(exponents, centre)), *exponents],
        "covariance": law.covariance.tolist(),
        "variance": law.scatter**2,
        "dof": law.dof,
        "reach": float(stats.t.ppf(0.975, law.dof)) if law.dof > 0 else None,
        "near": near,
        "range": _range(used),
        "cells": law.n_cells,
        "cautions": list(cautions.of_law(law.target, law)),
    }


def _surface(fits: Fits) -> dict[str, Any] | None:
    """The joint surface's law of the optimum: mean and variance at a run that it has not seen."""
    surface = fits.surface
    if surface is None:
        return None
    sides = []
    for axis, quantity in enumerate(SEARCHED):
        known = [
            cell
            for cell, optimum in fits.optima["surface"].items()
            if optimum.interior and math.isfinite(optimum.covariance[axis, axis])
        ]
        if len(known) < SURFACE_CELLS:
            sides.append(None)
            continue
        sides.append(_surface_side(surface, axis, quantity, fits.cells.loc[sorted(known)]))
    return {
        "centre": surface.covariates.centre.tolist(),
        "sparse": surface.covariates.sparse,
        "families": [list(f) for f in surface.covariates.families],
        "sides": dict(zip(SEARCHED, sides, strict=True)),
    }


def _surface_side(
    surface: Surface, axis: int, quantity: str, known: pd.DataFrame
) -> dict[str, Any]:
    laws = surface.laws
    p = len(laws.names)
    exponents = laws.exponents[axis]
    covariance = laws.covariance[axis * p : (axis + 1) * p, axis * p : (axis + 1) * p]

    def beyond(sparsity: float) -> tuple[float, float]:
        """What an unseen cell's mean and variance have that the law itself has not."""
        n, d = np.exp(surface.covariates.centre)
        cell = CellFeatures("run", float(n), float(d), 1, 1, float(n) * math.exp(sparsity))
        x = surface.covariates.matrix([cell])[0]
        posterior = surface.optimum(cell)
        mean = float(posterior.mean[axis] - exponents @ x)
        return mean, float(posterior.covariance[axis, axis] - x @ covariance @ x)

    mean, variance = beyond(0.0)
    mean_one, variance_one = beyond(1.0)
    return {
        "exponents": exponents.tolist(),
        "covariance": covariance.tolist(),
        # Sparsity that no cell has taught: the published exponent, and doubt that grows with it.
        "mean": [mean, mean_one - mean],
        "variance": [variance, variance_one - variance],
        "reach": float(stats.t.ppf(0.975, laws.degrees[axis])),
        "range": _range(known),
        "cells": len(known),
        "cautions": list(cautions.of_law(SEARCHED[axis], None)),
    }


# --- published laws ----------------------------------------------------------------------------

_FEATURES = ("active", "total", "with_head", "tokens", "flops", "flops_non_embedding", "experts")


def _published(law: PublishedLaw) -> dict[str, Any] | None:
    """A published law as a power law of `_FEATURES`; None where it is none, or has no value.

    Found by asking it: laws are functions, and every one with a value is a product of powers."""
    sides = {"learning_rate": law.learning_rate, "batch_tokens": law.batch_tokens}
    settings, features = _settings()
    found: dict[str, Any] = {}
    for quantity, answer in sides.items():
        values = [answer(s) for s in settings]
        if any(v is None or v <= 0 for v in values):
            continue
        y = np.log(np.array(values, dtype=float))
        design = np.column_stack([np.ones(len(y)), features])
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        if np.abs(design @ solution - y).max() < 1e-9:
            found[quantity] = np.where(np.abs(solution) < 1e-12, 0.0, solution).tolist()
    if not found:
        return None
    return {
        "source": law.source,
        "applies": law.applies,
        "verified": law.verified,
        **found,
    }


def _settings() -> tuple[Sequence[Setting], np.ndarray]:
    """Runs that tell the features apart, and the logs of the features [runs, features]."""
    rng = np.random.default_rng(0)
    settings, features = [], []
    for _ in range(24):
        active = 10 ** rng.uniform(6, 10)
        total, head = active * 10 ** rng.uniform(0, 1), active * 10 ** rng.uniform(-2, 0)
        tokens, each = 10 ** rng.uniform(8, 12), active * rng.uniform(6, 9) + 6 * head
        experts = int(rng.integers(2, 65))
        setting = Setting(
            params_active_non_embedding=active,
            tokens=tokens,
            params_total_non_embedding=total,
            params_active=active + 2 * head,
            head_params=head,
            flops_per_token=each,
            experts=experts,
            top_k=1,
        )
        settings.append(setting)
        compute = setting.flops, setting.flops_non_embedding
        features.append([active, total, active + head, tokens, *compute, experts])
    return settings, np.log(features)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    assert value is None or isinstance(value, str | int | bool), type(value)
    return value
