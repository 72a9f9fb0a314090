"""The laws: learning rate, batch and loss of each cell against its size, with what is fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from raysweep.report.answers import Answer
from raysweep.report.figure import (
    Axis,
    Line,
    Look,
    Panel,
    PlotFigure,
    Points,
    Series,
    cell_points,
    looks,
)
from raysweep.scaling.compute.allocation import COUNT_NAMES
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import Evidence
from raysweep.scaling.fits import Fits
from raysweep.scaling.optima.literature import PUBLISHED_LAWS
from raysweep.scaling.quantities import ANSWERS, QUANTITIES, TARGETS
from raysweep.scaling.relations import PUBLISHED
from raysweep.scaling.runs import AXES, RunMaker
from raysweep.study.shape import RunSize
from raysweep.text import estimated, short, written

PARAMS, TOKENS, FLOPS = AXES.values()

POINTS = 25
"""Points of a curve."""

APART, TOGETHER = 0.05, 0.2
"""ln units: an axis along which cells differ by less is not drawn; sizes that stray by less from a
trend follow it."""

MAX_ARCHITECTURES = 6
"""Architectures told apart in one figure."""

PUBLISHED_MARGIN = 6.0
"""A published law is drawn as far as this factor beyond one's own optima and no farther."""


@dataclass(frozen=True)
class Path:
    """Runs along an axis, `held` says at what (`D 4B`); the first of several has the band."""

    held: str
    runs: tuple[RunSize, ...]

    def along(self, axis: str) -> np.ndarray:
        """Their sizes [n]."""
        return np.array([r.compute if axis == FLOPS else getattr(r, axis) for r in self.runs])


def names_of(fits: Fits) -> list[str]:
    """The architectures that figures show."""
    return fits.architectures[:MAX_ARCHITECTURES]


def law_figures(fits: Fits, answers: Sequence[Answer]) -> list[PlotFigure]:
    """One figure each of learning rate, batch and loss against N, D, C and the loss; those without
    any cell are left out."""
    names = names_of(fits)
    if not names:
        return []
    cells = fits.cells[fits.cells["architecture"].isin(names)]
    known = {q: cells[cells[q].notna()] for q in ANSWERS}
    paths = {name: _paths_of(fits, name, answers, len(names) == 1) for name in names}
    figures = []
    for quantity, own in known.items():
        if not len(own):
            continue
        axes = [a for a in AXES.values() if np.ptp(np.log(own[a].to_numpy(float))) > APART]
        axes = axes or [FLOPS]
        across = [QUANTITIES[a].label for a in axes]
        panels = [
            _panel(fits, own, quantity, axis, {n: paths[n].get(axis, ()) for n in names}, answers)
            for axis in axes
        ]
        if quantity != "loss" and (last := _against_loss(fits, own, quantity)) is not None:
            panels.append(last)
            across.append(QUANTITIES["loss"].label)
        if quantity == "loss" and (rest := _left_over(fits, own)) is not None:
            panels.append(rest)
            across.append("C, above the law")
        word = Axis.of(quantity, best=True).label
        drawn = tuple(n for n in names if (own["architecture"] == n).any())
        figures.append(
            PlotFigure(
                quantity.replace("_", "-"),
                f"{word[:1].upper()}{word[1:]} of each cell against its size, with the fitted law",
                tuple(panels),
                drawn,
                height=2.7 if len(panels) > 2 else 3.0,
                choose=tuple(across),
            )
        )
    return figures


def _panel(
    fits: Fits,
    cells: pd.DataFrame,
    quantity: str,
    axis: str,
    paths: Mapping[str, Sequence[Path]],
    answers: Sequence[Answer],
) -> Panel:
    look = looks(fits.architectures)
    series: list[Series] = []
    several = sum(bool(p) for p in paths.values()) > 1
    for name, own_paths in paths.items():
        own = cells[cells["architecture"] == name]
        for k, path in enumerate(own_paths):
            y, low, high = told_along(fits.evidence_of(name), name, path, quantity).T
            if np.isfinite(y).any():
                end = path.held if not several or k else ""
                series.append(
                    Line(
                        f"{name}, law{' at ' + path.held if path.held else ''}",
                        path.along(axis), y, look[name].colour,
                        low if k == 0 else None, high if k == 0 else None, k > 0, end=end,
                    )
                )  # fmt: skip
        if len(own):
            series.append(_cell_points(fits, own, quantity, axis, look[name]))
    for a in answers:
        value = getattr(a.run, "batch_tokens_exact" if quantity == "batch_tokens" else quantity)
        if a.run.architecture in paths and math.isfinite(value):
            at = a.run.run.compute if axis == FLOPS else getattr(a.run.run, axis)
            low, high = getattr(a.run, f"{quantity}_interval")
            tip = f"{a.run.architecture}, asked: {QUANTITIES[quantity].write(value)}"
            series.append(
                Points(
                    "asked", np.array([at]), np.array([value]),
                    look[a.run.architecture].colour, "*",
                    np.array([low]), np.array([high]), tips=[tip], names=[a.run.architecture],
                    size=110, legend="run asked about",
                )
            )  # fmt: skip
    if quantity in TARGETS:
        series += _published(series, paths, quantity, axis)
    return Panel(Axis.of(axis), Axis.of(quantity, best=True), tuple(series))


def _cell_points(fits: Fits, own: pd.DataFrame, quantity: str, axis: str, look: Look) -> Points:
    y = own[quantity].to_numpy(float)
    if quantity == "loss":
        half = 1.96 * (own["loss_se"] / own["loss"]).to_numpy(float)
        reached = ~own["loss_from"].isin(["trials", "edge"])
        full = reached.to_numpy() | (own["n_searched"] == 0).to_numpy()
    else:
        k = TARGETS.index(quantity)
        half = np.array([1.96 * fits.optima["model"][str(c)].covariance[k, k] ** 0.5
                         for c in own.index])  # fmt: skip
        full = (own["status"] == "interior").to_numpy()
    name = str(own["architecture"].iloc[0])
    write, low, high = QUANTITIES[quantity].write, y * np.exp(-half), y * np.exp(half)
    return cell_points(name, own, axis, y, look, write, low, high, full, shaded=True)


def told_along(evidence: Evidence, name: str, path: Path, quantity: str) -> np.ndarray:
    """[n, 3]: a quantity along a path with its interval for a new run."""
    if quantity == "loss":
        found = [a.loss for a in evidence.loss_of_each(name, path.runs)]
    else:
        optima = [evidence.optimum(run) for run in path.runs]
        found = [o.estimates()[TARGETS.index(quantity)] for o in optima if o is not None]
    if not found:
        return np.full((len(path.runs), 3), math.nan)
    return np.array([[e.value, e.low, e.high] for e in found])


def _published(
    series: Sequence[Series], paths: Mapping[str, Sequence[Path]], quantity: str, axis: str
) -> list[Line]:
    """Thin lines of published laws along the same path, named at their right end."""
    path = next((p for own in paths.values() for p in own[:1]), None)
    dots = np.concatenate([s.y for s in series if isinstance(s, Points)] or [np.array([])])
    if path is None or not len(dots):
        return []
    low, high = dots.min() / PUBLISHED_MARGIN, dots.max() * PUBLISHED_MARGIN
    lines = []
    for law in PUBLISHED_LAWS.values():
        said = [getattr(law, quantity)(run) for run in path.runs]
        y = np.array([math.nan if v is None else v for v in said])
        y[~((y > low) & (y < high))] = math.nan
        if law.covers(path.runs[0]) and np.isfinite(y).sum() > 1:
            name = law.source.split(",")[0].replace(" et al.", "")
            lines.append(
                Line(law.source, path.along(axis), y, "faint", thin=True, end=name,
                     legend="published laws")
            )  # fmt: skip
    return lines


def _against_loss(fits: Fits, cells: pd.DataFrame, quantity: str) -> Panel | None:
    """Optima against the loss, with the power law of it, where any is determined."""
    look = looks(fits.architectures)
    known = cells[cells["loss"].notna()]
    series: list[Series] = []
    for name, own in known.groupby("architecture", sort=False):
        relation = fits.relations[str(name)].get(quantity)
        if relation is not None:
            x = np.geomspace(*relation.losses, 2)
            series.append(Line(f"{name}, law", x, relation.at(x), look[str(name)].colour))
            series.append(_cell_points(fits, own, quantity, "loss", look[str(name)]))
    if not series:
        return None
    x = Axis.of("loss", reverse=True)
    return Panel(x, Axis.of(quantity, best=True), tuple(series))


def _left_over(fits: Fits, cells: pd.DataFrame) -> Panel | None:
    """Each cell's loss over what its law says, in per cent; None without a law."""
    look = looks(fits.architectures)
    series: list[Series] = []
    for name, own in cells.groupby("architecture", sort=False):
        said = _law_says(fits, str(name), own)
        if said is None:
            continue
        rest = 100 * (own["loss"].to_numpy(float) / said - 1)
        series.append(
            cell_points(str(name), own, FLOPS, rest, look[str(name)], "{:+.2f} %".format,
                        shaded=True)
        )  # fmt: skip
    if not series:
        return None
    y = Axis("loss above the law, %", "number", log=False)
    return Panel(Axis.of(FLOPS), y, tuple(series), neutral=0.0)


def _law_says(fits: Fits, name: str, own: pd.DataFrame) -> np.ndarray | None:
    """What the law of the loss says of an architecture's cells [n]; None without one."""
    model, evidence = fits.loss_model(name), fits.evidence_of(name)
    if not model.ok:
        return None
    sizes = [evidence.sizes[str(c)] for c in own.index]
    groups = [0.0 if evidence.surface is None else evidence.surface.group_offset(s.group)
              for s in sizes]  # fmt: skip
    return model.predict_mean(sizes)[0] * np.exp(groups)


# ---------------------------------------------------------------------- paths


def _paths_of(
    fits: Fits, name: str, answers: Sequence[Answer], several: bool
) -> dict[str, list[Path]]:
    """Paths through an architecture's cells and as far as the runs asked about of it."""
    cells = fits.cells_of(name)
    asked = [a.run.run for a in answers if a.run.architecture == name]
    first = asked[0] if asked else fits.evidence_of(name).sizes[str(cells.index[0])]
    maker = RunMaker.after(cells, experts=first.experts, top_k=first.top_k, group=first.group)
    return {axis: paths_along(cells, maker, axis, asked, several) for axis in AXES.values()}


def paths_along(
    cells: pd.DataFrame,
    maker: RunMaker,
    axis: str,
    asked: Sequence[RunSize] = (),
    several: bool = False,
) -> list[Path]:
    """Paths of runs along an axis, through cells and as far as the runs asked about; held at other
    sizes too where `several`."""
    sizes = cells[[PARAMS, TOKENS, FLOPS]].to_numpy(float)
    far = [r.compute if axis == FLOPS else getattr(r, axis) for r in asked]
    ends = np.concatenate([cells[axis].to_numpy(float), far])
    low, high = float(ends.min()), float(ends.max())
    if high < low * 1.05:
        low, high = low / 2, high * 2
    x = np.geomspace(low, high, POINTS)
    runs = [(r.params_active_non_embedding, r.tokens) for r in asked]
    return [
        Path(held, tuple(maker(float(a), float(b)) for a, b in zip(n, d, strict=True)))
        for held, n, d in _sizes(sizes, axis, x, runs, several)
    ]


def _sizes(
    cells: np.ndarray,
    axis: str,
    x: np.ndarray,
    asked: Sequence[tuple[float, float]],
    several: bool,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(what is held, N [n], D [n]) along an axis of cells [n, 3]; the first has the band.

    Along C the tokens a parameter are held, along N the tokens, along D the parameters, unless the
    cells themselves follow a trend."""
    n, d, c = cells.T
    at = {PARAMS: n, TOKENS: d, FLOPS: c}[axis]
    cost = float(np.median(c / (n * d)))

    def other(a: Any, b: Any) -> Any:
        return b if axis == PARAMS else a if axis == TOKENS else b / a

    def place(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if axis == FLOPS:
            params = np.sqrt(x / (cost * values))
            return params, values * params
        return (x, values) if axis == PARAMS else (values, x)

    held = other(n, d)
    a, v = np.log(at), np.log(held)
    slope = 0.0 if np.ptp(a) < 0.02 else float(np.polyfit(a, v, 1)[0])
    level = float(v.mean() - slope * a.mean())
    off = [float(other(*run)) for run in asked[:1]]
    if float((v - level - slope * a).std()) < TOGETHER:
        follow = np.exp(level + slope * np.log(x))
        found = [("", *place(follow))]
        end = math.exp(level + slope * math.log(x[-1]))
        chosen = [value for value in off if abs(math.log(value / end)) > TOGETHER]
    else:
        found = []
        values = np.sort(held)
        middle = float(values[len(values) // 2])
        chosen = [middle, float(values[0]), float(values[-1])] if several else [middle]
        chosen += [v for v in off if all(abs(math.log(v / c)) > TOGETHER for c in chosen)]
    symbol = {PARAMS: "D", TOKENS: "N", FLOPS: "D/N"}[axis]
    for value in dict.fromkeys(chosen):
        found.append((f"{symbol} {short(value)}", *place(np.full_like(x, value))))
    return found


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True)
class LawRow:
    """One row of the table of laws."""

    name: str
    of: str
    formula: str
    exponents: tuple[tuple[str, Any, float], ...]
    """(symbol, estimate, share that the data told)."""
    held_out: str
    note: str


def law_rows(fits: Fits) -> list[LawRow]:
    """The laws of optima of each set of data, and of the loss of each architecture."""
    rows = []
    for label, evidence in fits.evidence.items():
        surface = evidence.surface
        if surface is None:
            continue
        laws = surface.laws
        for axis, target in enumerate(TARGETS):
            if target == "batch_tokens" and surface.batch_rule is not None:
                continue
            terms = list(zip("abs", surface.bases.items(), strict=False))
            at = QUANTITIES[target].write(laws.at_centre[axis])
            rows.append(
                LawRow(
                    label or ", ".join(names_of(fits)),
                    f"optimal {QUANTITIES[target].name}",
                    " ".join([at, *(f"{base}^{s}" for s, (_, base) in terms)]),
                    tuple(
                        (s, laws.exponent(target, e), laws.learned(target, e))
                        for s, (e, _) in terms
                    ),
                    _covered(fits, target),
                    "",
                )
            )
    shown_models: dict[int, int] = {}
    for name in fits.architectures:
        model = fits.loss_model(name)
        if id(model) in shown_models:
            first = shown_models[id(model)]
            rows[first] = LawRow(f"{rows[first].name}, {name}", *_rest(rows[first]))
            continue
        if not model.ok or model.law is None:
            continue
        shown_models[id(model)] = len(rows)
        held = ""
        if (score := model.score).runs:
            held = f"{score.covered} of {score.runs} runs inside, "
            held += f"{written(score.off, 'percent')} off"
        rows.append(
            LawRow(
                name,
                QUANTITIES["loss"].name,
                model.law.formula,
                tuple((k, e, math.nan) for k, e in model.coefficients.items()),
                held,
                f"{model.law.name}, {model.law.source}; N is {COUNT_NAMES[model.count]}",
            )
        )
    said: set[str] = set()
    for name, relations in fits.relations.items():
        for target, relation in relations.items():
            others = "" if target in said else f"; {PUBLISHED[target]}"
            said.add(target)
            symbol = estimated(relation.coefficient, style="coefficient")
            rows.append(
                LawRow(
                    name,
                    f"optimal {QUANTITIES[target].name} by loss",
                    f"{symbol} L^a",
                    (("a", relation.exponent, math.nan),),
                    "",
                    f"{relation.n_cells} cells{others}",
                )
            )
    return rows


def group_rows(fits: Fits) -> list[tuple[str, dict[str, Estimate]]]:
    """(group, its learning rate, batch and loss over the mean of all) where results are grouped."""
    return [
        (
            ", ".join(part for part in (label, group) if part),
            dict(zip(ANSWERS, evidence.surface.group_effect(group), strict=True)),
        )
        for label, evidence in fits.evidence.items()
        if evidence.surface is not None
        for group in evidence.surface.design.groups
    ]


def _rest(row: LawRow) -> tuple[Any, ...]:
    return row.of, row.formula, row.exponents, row.held_out, row.note


def _covered(fits: Fits, target: str) -> str:
    if fits.held_out is None:
        return ""
    inside, n = fits.held_out.covered(target)
    return f"{inside} of {n} cells inside" if n else ""
