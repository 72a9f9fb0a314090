"""What the figures of laws are drawn along: how N, D and C move together, and the law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.group_loss import predict_loss
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.published import Setting
from raysweep.scaling.recommend import Recommendation
from raysweep.scaling.target import Target, describe_target

PARAMS, TOKENS, FLOPS = "params_active_non_embedding", "tokens", "flops"
AXES: dict[str, str] = {PARAMS: "N", TOKENS: "D", FLOPS: "C"}

TOGETHER = 0.15
"""Where ln D strays less than this (sd) from its trend along N, a family has one line, not many."""

POINTS = 24


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
    """The architectures, without the group of all."""
    return [name for name in fits.groups if name != ALL]


def laws_used(fits: Fits, name: str) -> dict[str, PowerLaw]:
    """The laws that `recommend` answers with for an architecture, by what they are of."""
    cells = fits.groups[name].cells
    if not len(cells):
        return {}
    largest = cells.iloc[-1]
    try:
        found = fits.recommend(name, float(largest[PARAMS]), float(largest[TOKENS]))
    except UserError:
        return {}
    return {
        quantity: law
        for quantity in ("learning_rate", "batch_tokens")
        if (law := law_named(fits, name, found.laws.get(quantity))) is not None
    }


def law_named(fits: Fits, name: str, law: str | None) -> PowerLaw | None:
    """A law by its name: the architecture's own, or that of all architectures together."""
    for group in (name, ALL):
        if law is not None and group in fits.groups and law in fits.groups[group].laws:
            return fits.groups[group].laws[law]
    return None


def varying(cells: pd.DataFrame) -> list[str]:
    """The axes along which a table of cells has more than one value."""
    return [c for c in AXES if len(cells) and cells[c].max() > cells[c].min() * 1.02]


def ask(law: PowerLaw, target: Target) -> tuple[float, float, float]:
    """(value, low, high) of a law at a described run."""
    inputs = dict(target.inputs)
    if law.count:
        inputs["params"] = inputs.get(law.count, math.nan)
    if not all(inputs.get(n, 0) > 0 for n in law.inputs):
        return (math.nan,) * 3
    low, high = law.interval(inputs)
    return float(law.predict(inputs)), float(low), float(high)


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
    cells: pd.DataFrame, law: PowerLaw | None, axis: str, reach: Sequence[float], several: bool
) -> list[Line]:
    """A law of one family along one axis, from its smallest cell to the farthest of `reach`.

    What is not on the axis follows the family's own trend where its cells leave no choice; else it
    is held at its middle value, and at its ends too where `several` lines may be drawn.
    """
    if law is None or not law.ok or not len(cells):
        return []
    used = cells.loc[[c for c in law.cells if c in cells.index]]
    used = used if len(used) else cells
    x = _grid(used[axis].to_numpy(float), reach)
    experts, top_k = int(used["experts"].iloc[0]), int(used["top_k"].iloc[0])
    lines = []
    for held, params, tokens in _paths(used, axis, x, several):
        targets = [
            describe_target(used, float(n), float(d), experts, top_k)
            for n, d in zip(params, tokens, strict=True)
        ]
        y, low, high = np.array([ask(law, t) for t in targets]).T
        at = np.array([t.inputs[axis] for t in targets])
        lines.append(Line(at, y, low, high, held, tuple(t.setting() for t in targets)))
    return lines


def path_of(cells: pd.DataFrame, axis: str, reach: Sequence[float]) -> Line:
    """A family's own path along an axis, without a law: for the published ones."""
    x = _grid(cells[axis].to_numpy(float), reach)
    held, params, tokens = _paths(cells, axis, x, False)[0]
    experts, top_k = int(cells["experts"].iloc[0]), int(cells["top_k"].iloc[0])
    runs = tuple(
        describe_target(cells, float(n), float(d), experts, top_k).setting()
        for n, d in zip(params, tokens, strict=True)
    )
    nothing = np.full_like(x, math.nan)
    return Line(x, nothing, nothing, nothing, held, runs)


def _grid(values: np.ndarray, reach: Sequence[float]) -> np.ndarray:
    ends = np.concatenate([values, np.asarray(reach, dtype=float)])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    low, high = ends.min(), ends.max()
    if high < low * 1.02:
        low, high = low / 2, high * 2
    return np.geomspace(low, high, POINTS)


def _paths(
    cells: pd.DataFrame, axis: str, x: np.ndarray, several: bool
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(what is held, N [n], D [n]) along an axis; the first is the middle one, which has the band.

    Along C the tokens a parameter are held, along N the tokens, along D the parameters."""
    n, d = cells[PARAMS].to_numpy(float), cells[TOKENS].to_numpy(float)
    at = cells[axis].to_numpy(float)
    other = {PARAMS: d, TOKENS: n, FLOPS: d / n}[axis]
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
    symbol = {PARAMS: "D", TOKENS: "N", FLOPS: "D/N"}[axis]
    return [
        (f"{symbol}={value:.6g}", *place(np.full_like(x, value)))
        for value in sorted(chosen, key=lambda v: (v != middle, v))
    ]


def _trend(at: np.ndarray, values: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    """`values` at `x` by a power law of `at`, and how far (sd of the log) they stray from it."""
    a, v = np.log(at), np.log(values)
    if np.ptp(a) < 0.02:
        return np.full_like(x, np.exp(v.mean())), float(v.std())
    slope, level = np.polyfit(a, v, 1)
    stray = v - (level + slope * a)
    return np.exp(level + slope * np.log(x)), float(stray.std())


def reach_of(answers: Sequence[Recommendation], name: str, axis: str, cells: pd.DataFrame) -> list:
    """Where the asked-for runs of an architecture lie on an axis."""
    found = []
    for answer in answers:
        if answer.architecture != name:
            continue
        target = describe_target(cells, answer.params, answer.tokens, answer.experts, answer.top_k)
        found.append(target.inputs[axis])
    return found


def loss_along(
    fits: Fits, name: str, key: str, reach: Sequence[float], several: bool
) -> list[Line]:
    """The law of the loss `key` of an architecture along compute; no line without it."""
    groups = [fits.groups[g] for g in (name, ALL) if g in fits.groups]
    laws = next((g.loss_laws for g in groups if key in g.loss_laws and g.loss_laws[key].ok), None)
    if laws is None:
        return []
    cells = fits.groups[name].cells
    x = _grid(cells[FLOPS].to_numpy(float), reach)
    experts, top_k = int(cells["experts"].iloc[0]), int(cells["top_k"].iloc[0])
    lines = []
    for held, params, tokens in _paths(cells, FLOPS, x, several):
        targets = [
            describe_target(cells, float(n), float(d), experts, top_k)
            for n, d in zip(params, tokens, strict=True)
        ]
        answers = [predict_loss(laws, [key], t.inputs) for t in targets]
        y, low, high = np.array([a[1:] if a else (math.nan,) * 3 for a in answers]).T
        flops = np.array([t.inputs["flops"] for t in targets])
        lines.append(Line(flops, y, low, high, held, tuple(t.setting() for t in targets)))
    return lines
