"""What the page answers: the runs asked about, and a grid of the fitted object's answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.scaling.evidence import Evidence
from raysweep.scaling.fits import Fits
from raysweep.scaling.optima.literature import published_answers
from raysweep.scaling.recommend import (
    EXTRAPOLATED,
    INSIDE,
    LONG,
    NEAR,
    NOT_DETERMINED,
    Recommendation,
    answer,
)
from raysweep.scaling.runs import AXES, SAME, RunMaker
from raysweep.study.shape import RunSize
from raysweep.text import read_size, short

Asked = Sequence[tuple[float | str, float | str]]

NO_OPTIMUM = "learning rate and batch not determined"
"""The verdict on a run where only the loss can be told."""

DEFAULT_REACH = 10.0
"""Where nobody asks, the page answers for this many times the compute of the largest cell."""

WITHIN = (0.001, 0.0025, 0.005, 0.01, 0.02)
"""Shares of the best loss that a larger batch may cost."""

BELOW, BEYOND = 10.0, 1e4
"""How far below and beyond the cells the grid goes, as factors of N and of D."""

STEP = 0.75
"""Distance between nodes in ln N and ln D, at least; wider where there are many architectures."""

MAX_NODES = 4000
"""Of all architectures, routings and groups together."""

ASKED = 5e-5
"""In ln N and ln D, how near to a run that was asked for its exact answer is given: logs have five
decimals."""

COARSE = 5
"""Nodes a side for what varies slowly: published laws, and the cost of a larger batch."""


@dataclass(frozen=True)
class Answer:
    """A recommendation, and who asked for it: a person, or this page for want of a question."""

    run: Recommendation
    named: bool

    @property
    def outside(self) -> str:
        """How far the run lies outside the cells, in words; empty inside."""
        said = []
        for words, size in (("beyond", lambda f: f), ("below", lambda f: 1 / f)):
            factors = {axis: size(f) for axis, f in self.run.extrapolation.items()}
            own = [f"{short(f)}\N{MULTIPLICATION SIGN} in {a}" for a, f in factors.items() if f > 1]
            said += [f"{words} the cells by {', '.join(own)}"] if own else []
        return "; ".join(said)

    @property
    def verdict(self) -> str:
        """The verdict, and what of the answer it concerns where that is not all."""
        return NO_OPTIMUM if self.run.verdict == NOT_DETERMINED else self.run.verdict


def ask(fits: Fits, studies: Sequence[Mapping[str, Any]], asked: Asked = ()) -> list[Answer]:
    """The answers that the page opens with: to `asked`, (params, tokens) of every architecture;
    else to the targets of the studies; else to a run beyond the cells of each architecture.

    Raises:
        UserError: a size that is no number.
    """
    found: list[Answer] = []
    for params, tokens in asked:
        n, d = read_size(params, "params"), read_size(tokens, "tokens")
        found += [Answer(_recommend(fits, name, n, d), True) for name in fits.architectures]
    if found:
        return found
    for study in studies:
        targets = study["space"].get("targets")
        for target in targets if isinstance(targets, list) else ():
            try:
                n, d = float(target["params"]), float(target["tokens"])
                found.append(Answer(_recommend(fits, str(target["architecture"]), n, d), True))
            except (UserError, KeyError, TypeError, ValueError):
                continue  # a target that cannot be read is no reason to go without a page
    covered = {a.run.architecture for a in found}
    for name in fits.architectures:
        if name not in covered:
            found.append(Answer(_recommend(fits, name, *_default(fits, found, name)), False))
    return found


def _recommend(fits: Fits, name: str, params: float, tokens: float) -> Recommendation:
    found = fits.recommend(name, params, tokens)
    assert isinstance(found, Recommendation)
    return found


def _default(fits: Fits, found: Sequence[Answer], name: str) -> tuple[float, float]:
    """The run asked of another architecture, so that they stand side by side; else one of ten times
    the compute of the largest cell at the cells' usual tokens a parameter."""
    if found:
        return found[0].run.params, found[0].run.tokens
    cells = fits.cells_of(name)
    largest = cells.iloc[-1]
    ratio = float((cells[AXES["D"]] / cells[AXES["N"]]).median())
    compute = DEFAULT_REACH * float(largest[AXES["N"]]) * float(largest[AXES["D"]])
    params = float(f"{math.sqrt(compute / ratio):.2g}")
    return params, float(f"{params * ratio:.2g}")


# ---------------------------------------------------------------------- the grid


def answer_grid(fits: Fits, answers: Sequence[Answer]) -> dict[str, Any] | None:
    """What the page interpolates: for every architecture, routing and group, answers over a grid of
    ln N and ln D, and the exact ones at the cells and at the runs asked about."""
    families = list(_families(fits))
    if not families:
        return None
    step = STEP
    while sum(_nodes(f.box(answers), step) for f in families) > MAX_NODES:
        step *= 1.15
    return _rounded(
        {
            "within": WITHIN,
            "near": NEAR,
            "long": LONG,
            "words": {"inside": INSIDE, "extrapolated": EXTRAPOLATED},
            "entries": [family.entry(answers, step) for family in families],
        }
    )


@dataclass(frozen=True)
class _Family:
    """One architecture with one routing and group."""

    evidence: Evidence
    architecture: str
    kind: str
    experts: int
    top_k: int
    group: str
    cells: pd.DataFrame
    """Of the architecture."""
    foreign: bool
    """Whether none of its cells has this routing."""

    def box(self, answers: Sequence[Answer]) -> np.ndarray:
        """[[low ln N, high ln N], [low ln D, high ln D]] of its grid."""
        ends = []
        for column, asked in (
            (AXES["N"], [a.run.params for a in answers]),
            (AXES["D"], [a.run.tokens for a in answers]),
        ):
            own = self.cells[column].to_numpy(float)
            low = min(own.min() / BELOW, *(v / 2 for v in asked), math.inf)
            high = max(own.max() * BEYOND, *(2 * v for v in asked), 0.0)
            ends.append([math.log(low), math.log(high)])
        return np.array(ends)

    def entry(self, answers: Sequence[Answer], step: float) -> dict[str, Any]:
        """What the page knows of it."""
        fine, coarse = (_axes(self.box(answers), s) for s in (step, None))
        after = self.evidence.cells if self.foreign else self.cells
        maker = RunMaker.after(after, experts=self.experts, top_k=self.top_k, group=self.group)
        middle = [math.exp(float(np.log(self.cells[AXES[a]]).mean())) for a in "ND"]
        usual = self._answer(maker(*middle))
        ranges = {a: [float(after[c].min()), float(after[c].max())] for a, c in AXES.items()}
        verdict = Answer(usual, False).verdict
        decided = verdict if verdict not in (INSIDE, EXTRAPOLATED) else None
        # The verdict says already that no trial tells both learning rate and batch.
        warnings = usual.warnings if self.evidence.surface is not None else usual.warnings[1:]
        fields, directions = self._fields(maker, fine)
        return {
            "architecture": self.architecture,
            "kind": self.kind,
            "experts": self.experts,
            "top_k": self.top_k,
            "group": self.group,
            "foreign": self.foreign,
            "sequence_length": usual.sequence_length,
            "batch_as_run": usual.batch_as_run,
            "verdict": decided,
            "warnings": warnings,
            "ranges": ranges,
            "grid": {"axes": [a.tolist() for a in fine], "fields": fields, **directions},
            "coarse": self._coarse(maker, coarse),
            "exact": self._exact(answers),
        }

    def _answer(self, run: RunSize) -> Recommendation:
        return answer(self.evidence, self.architecture, run, foreign=self.foreign)

    def _fields(
        self, maker: RunMaker, axes: Sequence[np.ndarray]
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        runs = [maker(float(n), float(d)) for n in np.exp(axes[0]) for d in np.exp(axes[1])]
        columns = {
            "flops": [math.log(r.compute) for r in runs],
            "total": [math.log(r.params_total_non_embedding) for r in runs],
        }
        losses = [a.loss for a in self.evidence.loss_of_each(self.architecture, runs)]
        for name in ("value", "low", "high"):
            key = "loss" if name == "value" else f"loss_{name}"
            columns[key] = [_log(getattr(loss, name)) for loss in losses]
        surface = self.evidence.surface
        names: list[str] = []
        codes: list[int] = []
        if surface is not None:
            optima = [surface.optimum(run) for run in runs]
            ends = np.stack([o.interval() for o in optima])
            for k, name in enumerate(("rate", "batch")):
                columns[name] = [float(o.mean[k]) for o in optima]
                columns[f"{name}_half"] = (0.5 * np.diff(ends[:, k])[:, 0]).tolist()
            said = [" and of ".join(surface.unspanned(run)) for run in runs]
            names = list(dict.fromkeys(said))
            codes = [names.index(words) for words in said]
        return columns, {"directions": names, "directions_at": codes}

    def _coarse(self, maker: RunMaker, axes: Sequence[np.ndarray]) -> dict[str, Any]:
        runs = [maker(float(n), float(d)) for n in np.exp(axes[0]) for d in np.exp(axes[1])]
        fields: dict[str, list[float]] = {}
        surface = self.evidence.surface
        if surface is not None and surface.batch_rule is None:
            above = np.array([surface.optimum(run).largest_batches(WITHIN) for run in runs])
            for k in range(len(WITHIN)):
                fields[f"most{k}"] = above[:, k, 0].tolist()
                fields[f"most_rate{k}"] = above[:, k, 1].tolist()
        said = [{str(a["law"]): a for a in published_answers(run)} for run in runs]
        laws = list(dict.fromkeys(key for s in said for key in s))
        published = []
        for key in laws:
            known = next(s[key] for s in said if key in s)
            law = {"source": known["source"], "verified": known["verified"]}
            for name, of in (("rate", "learning_rate"), ("batch", "batch_tokens")):
                values = [_log(s[key].get(of) if key in s else None) for s in said]
                if any(math.isfinite(v) for v in values):
                    law[name] = values
            published.append(law)
        return {"axes": [a.tolist() for a in axes], "fields": fields, "published": published}

    def _exact(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The cells, whose own trials tell more than the law, and the runs asked about."""
        own = self.cells[
            (self.cells["experts"] == self.experts)
            & (self.cells["top_k"] == self.top_k)
            & (self.cells["group"] == self.group)
        ]
        found = [
            self._point(self._answer(self.evidence.sizes[str(name)]), SAME, str(name))
            | {
                "status": "searched" if row["n_searched"] else "",
                "loss_from": row["loss_from"],
            }
            for name, row in own.iterrows()
        ]
        for a in answers:
            routing = (a.run.architecture, a.run.experts, a.run.top_k, a.run.run.group)
            if routing == (self.architecture, self.experts, self.top_k, self.group):
                found.append(self._point(a.run, ASKED, ""))
        return found

    def _point(self, a: Recommendation, within: float, cell: str) -> dict[str, Any]:
        optimum = self.evidence.optimum(a.run)
        rate, batch = optimum.mean.tolist() if optimum is not None else (math.nan, math.nan)
        # Half the width; where the rate is no answer (above 1), it has none.
        halves = np.full(2, math.nan) if optimum is None else np.diff(optimum.interval())[:, 0] / 2
        return {
            "params": math.log(a.params),
            "tokens": math.log(a.tokens),
            "within": within,
            "cell": cell,
            "flops": math.log(a.run.compute),
            "rate": rate,
            "rate_half": halves[0] if math.isfinite(a.learning_rate) else math.nan,
            "batch": batch,
            "batch_half": halves[1],
            "loss": _log(a.loss),
            "loss_low": _log(a.loss_interval[0]),
            "loss_high": _log(a.loss_interval[1]),
        }


def _families(fits: Fits) -> Iterator[_Family]:
    for evidence in fits.evidence.values():
        for name in evidence.architectures:
            cells = evidence.cells[evidence.cells["architecture"] == name]
            pairs = cells[["experts", "top_k"]].drop_duplicates().astype(int)
            routings = [(int(e), int(k), False) for e, k in pairs.to_numpy()]
            if fits.kind(name) == "moe" and evidence.surface is not None:
                known = {(e, k) for e, k, _ in routings}
                more = sorted({(int(e * f), k) for e, k in known for f in (0.5, 2, 4)} - known)
                routings += [(e, k, True) for e, k in more if e > max(k, 1)]
            for group in dict.fromkeys(cells["group"]):
                for experts, top_k, foreign in routings:
                    yield _Family(
                        evidence, name, fits.kind(name), experts, top_k, str(group), cells, foreign
                    )


def _nodes(box: np.ndarray, step: float) -> int:
    return int(np.prod(np.ceil(np.diff(box)[:, 0] / step) + 1))


def _axes(box: np.ndarray, step: float | None) -> list[np.ndarray]:
    """Nodes along ln N and ln D, `step` apart at most, at least four."""
    counts = [COARSE if step is None else max(4, math.ceil((b - a) / step) + 1) for a, b in box]
    return [np.linspace(a, b, n) for (a, b), n in zip(box, counts, strict=True)]


def _log(value: Any) -> float:
    number = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return math.log(value) if number else math.nan


def _rounded(value: Any) -> Any:
    """Plain values, numbers to five decimals (of logs) or six digits; null where there is none."""
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(v) for v in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if not math.isfinite(value):
        return None
    return round(float(value), 5) if abs(value) < 1e3 else float(f"{value:.7g}")
