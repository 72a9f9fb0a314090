"""What the figures of laws are drawn along: how N, D and C move together, and the law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from raysweep.errors import UserError
from raysweep.scaling.cells import COUNTS
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.selection import predict_loss
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.published import Setting
from raysweep.scaling.quantities import SEARCHED
from raysweep.scaling.recommend import Recommendation
from raysweep.scaling.surface import Surface
from raysweep.scaling.target import Target, describe_target

PARAMS, TOKENS, FLOPS = "params_active_non_embedding", "tokens", "flops"
AXES = (PARAMS, TOKENS, FLOPS)

Rule = PowerLaw | Surface
"""What a quantity is read off: a law of the optima or, with few cells, the joint surface."""

TOGETHER = 0.15
"""Where ln D strays less than this (sd) from its trend along N, a family has one line, not many."""

POINTS, CURVE_POINTS = 13, 41
"""Along a power law, straight in logs, and along a law of the loss, which bends."""

DESCRIBED = (
    *COUNTS,
    "experts",
    "top_k",
    "flops_exact",
    "flops_per_token",
    "d_model",
    "vocab_size",
)
"""The columns of cells that describe a run: a narrow table is faster to look into."""


@dataclass(frozen=True)
class Line:
    """A law drawn along one axis: x and y [n], a band [n] or NaN, and what is held fixed."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    held: str
    settings: tuple[Setting, ...]


def names_of(fits: Fits) -> list[str]:
    """The architectures, dense ones first, without the group of all."""
    names = [name for name in fits.groups if name != ALL]
    return sorted(names, key=lambda name: fits.groups[name].kind != "dense")


def rests_on(fits: Fits, name: str) -> dict[str, str]:
    """The names of the laws that `recommend` answers with for an architecture, by quantity."""
    cells = fits.groups[name].cells
    if not len(cells):
        return {}
    largest = cells.iloc[-1]
    try:
        return fits.recommend(name, float(largest[PARAMS]), float(largest[TOKENS])).laws
    except UserError:
        return {}


def rules_used(fits: Fits, name: str, named: Mapping[str, str]) -> dict[str, Rule]:
    """What answers for learning_rate and batch_tokens: the laws that go by these names, or the
    joint surface."""
    found: dict[str, Rule] = {}
    for quantity in SEARCHED:
        law = named.get(quantity)
        if law == "surface" and fits.surface is not None:
            found[quantity] = fits.surface
        for group in (name, ALL):
            if group in fits.groups and law in fits.groups[group].laws:
                found.setdefault(quantity, fits.groups[group].laws[law])
    return found


def varying(cells: pd.DataFrame) -> list[str]:
    """The axes along which a table of cells has more than one value."""
    return [c for c in AXES if len(cells) and cells[c].max() > cells[c].min() * 1.02]


def ask(rule: Rule, quantity: str, target: Target) -> tuple[float, float, float]:
    """(value, low, high) of a law, or of the joint surface, at a described run."""
    if isinstance(rule, Surface):
        axis = SEARCHED.index(quantity)
        posterior = rule.optimum(target.features())
        degrees = np.broadcast_to(rule.laws.degrees, (2,))[axis]
        half = stats.t.ppf(0.975, degrees) * math.sqrt(posterior.covariance[axis, axis])
        middle = float(posterior.mean[axis])
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)
    inputs = dict(target.inputs)
    if rule.count:
        inputs["params"] = inputs.get(rule.count, math.nan)
    if not all(inputs.get(n, 0) > 0 for n in rule.inputs):
        return math.nan, math.nan, math.nan
    low, high = rule.interval(inputs)
    return float(rule.predict(inputs)), float(low), float(high)


def apart(cells: pd.DataFrame) -> list[str]:
    """The axes worth a panel: N alone where N, D and C move together in every family."""
    shown = varying(cells)
    if len(shown) < 2:
        return shown or [PARAMS]
    for _, family in cells.groupby("architecture"):
        n, d = (family[c].to_numpy(float) for c in (PARAMS, TOKENS))
        if _trend(n, d, n)[1] > TOGETHER:
            return shown
    return [PARAMS] if PARAMS in shown else shown[:1]


def lines_along(
    cells: pd.DataFrame,
    rule: Rule | None,
    quantity: str,
    axis: str,
    asked: Sequence[Target],
    several: bool,
) -> list[Line]:
    """A law of one family along one axis, from its smallest cell to the farthest run `asked` about.

    What is not on the axis follows the family's own trend where its cells leave no choice; else it
    is held at its middle value and at that of the first run asked about, and at its ends too where
    `several` lines may be drawn.
    """
    if rule is None or not len(cells):
        return []
    lines = []
    for held, targets in _runs(cells, axis, asked, several):
        y, low, high = np.array([ask(rule, quantity, t) for t in targets]).T
        at = np.array([t.inputs[axis] for t in targets])
        lines.append(Line(at, y, low, high, held, tuple(t.setting() for t in targets)))
    return _distinct(lines)


def _distinct(lines: list[Line]) -> list[Line]:
    """The first line and those that differ from it; one alone holds nothing worth naming."""
    first = lines[0]
    different = [x for x in lines[1:] if not np.allclose(x.y, first.y, rtol=2e-3, equal_nan=True)]
    return [first, *different] if different else [replace(first, held="")]


def path_of(cells: pd.DataFrame, axis: str, asked: Sequence[Target]) -> Line:
    """A family's own path along an axis, without a law: for the published ones."""
    held, targets = _runs(cells, axis, asked, False)[0]
    at = np.array([t.inputs[axis] for t in targets])
    nothing = np.full_like(at, math.nan)
    return Line(at, nothing, nothing, nothing, held, tuple(t.setting() for t in targets))


def _runs(
    cells: pd.DataFrame, axis: str, asked: Sequence[Target], several: bool, points: int = POINTS
) -> list[tuple[str, list[Target]]]:
    """(what is held, runs along the axis) of one family, from its smallest cell to those asked."""
    family = cells[list(DESCRIBED)]
    x = _grid(cells[axis].to_numpy(float), [t.inputs[axis] for t in asked], points)
    experts, top_k = int(cells["experts"].iloc[0]), int(cells["top_k"].iloc[0])
    runs = []
    for held, params, tokens in _paths(cells, axis, x, asked, several):
        if axis == FLOPS:
            params, tokens = _of_flops(family, x, params, tokens, experts, top_k)
        pairs = zip(params, tokens, strict=True)
        runs.append((held, [describe_target(family, n, d, experts, top_k) for n, d in pairs]))
    return runs


def _of_flops(
    family: pd.DataFrame,
    flops: np.ndarray,
    params: np.ndarray,
    tokens: np.ndarray,
    experts: int,
    top_k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """N and D [n] at the same ratio that cost `flops` [n]: FLOPs a token are not quite proportional
    to N, but a power of it."""
    first, last = (
        describe_target(family, params[i], tokens[i], experts, top_k).inputs[FLOPS]
        / (params[i] * tokens[i])
        for i in (0, -1)
    )
    power = math.log(last / first) / math.log(params[-1] / params[0])
    cost = first * (params / params[0]) ** power * params * tokens
    off = (flops / cost) ** (1 / (2 + power))
    return params * off, tokens * off


def _grid(values: np.ndarray, reach: Sequence[float], points: int) -> np.ndarray:
    ends = np.concatenate([values, np.asarray(reach, dtype=float)])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    low, high = ends.min(), ends.max()
    if high < low * 1.02:
        low, high = low / 2, high * 2
    return np.geomspace(low, high, points)


def _paths(
    cells: pd.DataFrame, axis: str, x: np.ndarray, asked: Sequence[Target], several: bool
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(what is held, N [n], D [n]) along an axis; the first is the middle one, which has the band.

    Along C the tokens a parameter are held, along N the tokens, along D the parameters."""
    n, d = cells[PARAMS].to_numpy(float), cells[TOKENS].to_numpy(float)
    at = cells[axis].to_numpy(float)
    other = _held(n, d, axis)
    cost = float(np.median(cells[FLOPS].to_numpy(float) / (n * d)))

    def place(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if axis == PARAMS:
            return x, values
        if axis == TOKENS:
            return values, x
        params = np.sqrt(x / (cost * values))
        return params, values * params

    along, stray = _trend(at, other, x)
    if stray < TOGETHER:
        return [("", *place(along))]
    values = np.sort(other)
    middle = float(values[len(values) // 2])
    chosen = {float(values[0]), middle, float(values[-1])} if several else {middle}
    for target in asked[:1]:
        value = float(_held(target.inputs[PARAMS], target.inputs[TOKENS], axis))
        if all(abs(math.log(value / c)) > TOGETHER for c in chosen):
            chosen.add(value)
    symbol = {PARAMS: "D", TOKENS: "N", FLOPS: "D/N"}[axis]
    return [
        (f"{symbol}={value:.6g}", *place(np.full_like(x, value)))
        for value in sorted(chosen, key=lambda v: (v != middle, v))
    ]


def _held(n: Any, d: Any, axis: str) -> Any:
    """What is held along an axis: D along N, N along D, D/N along C."""
    return d if axis == PARAMS else n if axis == TOKENS else d / n


def _trend(at: np.ndarray, values: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    """`values` at `x` by a power law of `at`, and how far (sd of the log) they stray from it."""
    a, v = np.log(at), np.log(values)
    if np.ptp(a) < 0.02:
        return np.full_like(x, np.exp(v.mean())), float(v.std())
    slope, level = np.polyfit(a, v, 1)
    stray = v - (level + slope * a)
    return np.exp(level + slope * np.log(x)), float(stray.std())


def asked_of(
    answers: Sequence[Recommendation], name: str, cells: pd.DataFrame
) -> list[tuple[Recommendation, Target]]:
    """The recommendations of an architecture, each with every count of its run."""
    return [
        (a, describe_target(cells, a.params, a.tokens, a.experts, a.top_k))
        for a in answers
        if a.architecture == name
    ]


def loss_fit(fits: Fits, name: str, key: str | None) -> tuple[str, LossFit | None]:
    """The fitted law `key` of an architecture, or of all together, with the group it is of."""
    for group in (name, ALL):
        found = fits.groups[group].loss_laws.get(key or "") if group in fits.groups else None
        if isinstance(found, LossFit) and found.ok:
            return group, found
    return name, None


def loss_along(
    fits: Fits, name: str, key: str, asked: Sequence[Target], several: bool
) -> list[Line]:
    """The law of the loss `key` of an architecture along compute; no line without it."""
    _, found = loss_fit(fits, name, key)
    if found is None:
        return []
    lines = []
    for held, targets in _runs(fits.groups[name].cells, FLOPS, asked, several, CURVE_POINTS):
        answers = [predict_loss({key: found}, [key], t.inputs) for t in targets]
        y, low, high = np.array([a[1:] if a else (math.nan,) * 3 for a in answers]).T
        flops = np.array([t.inputs["flops"] for t in targets])
        lines.append(Line(flops, y, low, high, held, tuple(t.setting() for t in targets)))
    return _distinct(lines)
