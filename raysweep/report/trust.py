"""How far to trust it: checks by architecture, held-out cells, the prior against the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from raysweep.report.figure import Axis, Panel, PlotFigure, Points, listed_height, looks
from raysweep.report.laws import names_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.held_out import HeldOut
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.optima.literature import PUBLISHED_LAWS
from raysweep.scaling.optima.readings import READINGS
from raysweep.scaling.optima.surface import Surface
from raysweep.scaling.quantities import ANSWERS, EXPONENTS, QUANTITIES, TARGETS
from raysweep.text import estimated, written

MAX_ROWS = 24
"""Held-out cells drawn: the largest."""

TOLD = 0.5
"""Share of the prior's variance that the data must take away for an exponent to be theirs."""

EXPECTED = 0.9
"""Coverage from which a check of 95 % intervals passes."""


@dataclass(frozen=True)
class Mark:
    """One cell of the table of checks: what is found; `good` None where it is neither."""

    text: str
    good: bool | None = None


def checks(fits: Fits) -> list[tuple[str, list[Mark]]]:
    """Checks x architectures: (check, one mark an architecture); rows that say nothing are out."""
    kinds: list[tuple[str, Callable[[Fits, str], Mark]]] = [
        ("cells, and trials that count", _counted),
        ("optima inside their trials", _interior),
        ("fit of the optima", _status),
        ("effects that the data tell, not the prior", _told),
        *((f"{QUANTITIES[q].name} of held-out cells inside 95 %", _covered(q)) for q in ANSWERS),
        ("loss lost by advice for held-out cells", _regret),
        ("law of the loss", _law),
        ("loss one level of compute ahead, inside 95 %", _ahead),
    ]
    names = names_of(fits)
    table = [(what, [check(fits, name) for name in names]) for what, check in kinds]
    return [(what, marks) for what, marks in table if any(m.text for m in marks)]


def _counted(fits: Fits, name: str) -> Mark:
    cells = fits.cells_of(name)
    trials = written(float(cells["n_finished"].sum()), "count")
    return Mark(f"{len(cells)}, {trials}")


def _surface(fits: Fits, name: str) -> Surface | None:
    return fits.evidence_of(name).surface


def _interior(fits: Fits, name: str) -> Mark:
    cells = fits.cells_of(name)
    searched = cells[cells["learning_rate"].notna()]
    inside = int((searched["status"] == "interior").sum())
    if not len(searched):
        return Mark("")
    return Mark(f"{inside} of {len(searched)}", inside >= 0.75 * len(searched))


def _status(fits: Fits, name: str) -> Mark:
    surface = _surface(fits, name)
    if surface is None:
        return Mark("no trial tells both learning rate and batch")
    if surface.batch_rule is not None:
        return Mark(f"{surface.status}; at the batch that was run", False)
    if not surface.varied[0]:
        return Mark(f"{surface.status}; no learning rate was varied", False)
    return Mark(surface.status, surface.status == "converged")


def _told(fits: Fits, name: str) -> Mark:
    surface = _surface(fits, name)
    if surface is None:
        return Mark("")
    said = []
    for target in TARGETS:
        told = [EXPONENTS[e] for e in surface.bases if surface.laws.learned(target, e) > TOLD]
        said.append(f"{QUANTITIES[target].name}: {', '.join(told) or 'none'}")
    return Mark("; ".join(said), None if "none" not in "".join(said) else False)


def _held(fits: Fits, name: str) -> HeldOut | None:
    """The held-out cells of one architecture."""
    held = fits.held_out
    if held is None:
        return None
    own = tuple(c for c in held.cells if fits.cells.loc[c.cell, "architecture"] == name)
    return HeldOut(own, held.n_train) if own else None


def _covered(quantity: str) -> Callable[[Fits, str], Mark]:
    def check(fits: Fits, name: str) -> Mark:
        held = _held(fits, name)
        inside, n = held.covered(quantity) if held else (0, 0)
        return Mark(f"{inside} of {n}", inside >= EXPECTED * n) if n else Mark("")

    return check


def _regret(fits: Fits, name: str) -> Mark:
    held = _held(fits, name)
    value = held.mean_regret if held else math.nan
    return Mark(f"{written(value, 'percent')} on average") if math.isfinite(value) else Mark("")


def _law(fits: Fits, name: str) -> Mark:
    model = fits.loss_model(name)
    if model.ok and model.law is not None:
        return Mark(model.law.key, True)
    return Mark("not determined", False)


def _ahead(fits: Fits, name: str) -> Mark:
    score = fits.loss_model(name).score
    if not score.runs:
        return Mark("")
    said = f"{score.covered} of {score.runs}, {written(score.off, 'percent')} off"
    return Mark(said, score.covered >= EXPECTED * score.runs)


def not_determined(fits: Fits) -> list[tuple[str, str]]:
    """(what, why) of the laws of the loss that do not answer, each said once."""
    found: dict[int, tuple[list[str], LossModel]] = {}
    for name in fits.architectures:
        model = fits.loss_model(name)
        if not model.ok:
            found.setdefault(id(model), ([], model))[0].append(name)
    return [(f"law of the loss of {', '.join(names)}", m.why) for names, m in found.values()]


# ---------------------------------------------------------------------- figures


def held_out_figure(fits: Fits) -> PlotFigure | None:
    """The largest cells as a fit of the smaller predicts them, over what their trials tell."""
    held = fits.held_out
    if held is None:
        return None
    shown = held.cells[-MAX_ROWS:]
    look = looks(fits.architectures)
    labels = tuple(c.cell for c in shown)
    panels = []
    for quantity in ANSWERS:
        one = QUANTITIES[quantity]
        series = []
        for name in names_of(fits):
            rows, found = [], []
            for row, cell in enumerate(shown):
                told, read = getattr(cell, quantity), getattr(cell, f"read_{quantity}")
                own = fits.cells.loc[cell.cell, "architecture"] == name
                if own and told.known and math.isfinite(read):
                    rows.append(row)
                    found.append((cell.cell, told, read))
            if not rows:
                continue
            ratio = np.array([[e.value / r, e.low / r, e.high / r] for _, e, r in found])
            tips = [
                f"{c}: predicted {estimated(e, style=one.style)}, measured {one.write(r)}"
                for c, e, r in found
            ]
            series.append(
                Points(name, ratio[:, 0], np.array(rows, float), *look[name],
                       ratio[:, 1], ratio[:, 2], tips=tips, names=[c for c, *_ in found])
            )  # fmt: skip
        if series:
            names = labels if not panels else ("",) * len(labels)
            axis = Axis(f"{one.name}, predicted over measured", "number")
            panels.append(Panel(axis, Axis("", names=names), tuple(series), neutral=1.0))
    if not panels:
        return None
    return PlotFigure(
        "held-out",
        "Held-out cells: predicted by a fit of the smaller cells, over what their trials tell",
        tuple(panels),
        tuple(names_of(fits)),
        height=listed_height(len(labels)),
    )


def prior_figure(fits: Fits) -> PlotFigure | None:
    """Exponents: published laws, the prior that they make, and what the data made of it."""
    table = fits.prior_table
    if not len(table):
        return None
    label = table["dataset"].iloc[0]
    table = table[(table["dataset"] == label) & (table["coefficient"] != "at the centre")]
    evidence = fits.evidence[str(label)]
    assert evidence.surface is not None
    surface = evidence.surface
    rows = list(surface.bases)
    places = np.arange(len(rows), dtype=float)
    names = tuple(f"exponent of {EXPONENTS[e]}" for e in rows)
    panels = []
    for axis, target in enumerate(TARGETS):
        own = table[table["target"] == target].set_index("coefficient").loc[rows]
        size = len(EXPONENTS) + 1
        laws = [(key, theta[axis * size + 1 :]) for key, theta in fits.prior.laws.items()]
        dots = np.array([[t[list(EXPONENTS).index(e)] for e in rows] for _, t in laws])
        said = [f"{PUBLISHED_LAWS[key].source}: {v:+.3f}" for (key, _), row in zip(laws, dots,
                strict=True) for v in row]  # fmt: skip
        prior, half = own["prior"].to_numpy(float), 1.96 * own["prior_sd"].to_numpy(float)
        series = (
            Points("published laws", dots.ravel(), np.tile(places - 0.24, len(laws)), "faint",
                   tips=said, names=[key for key, _ in laws for _ in rows], size=12),
            Points("prior", prior, places, "muted", "s", prior - half, prior + half,
                   tips=[f"prior {v:+.3f} \N{PLUS-MINUS SIGN} {h:.3f}" for v, h in zip(prior, half,
                         strict=True)]),
            Points("fitted", own["value"].to_numpy(float), places + 0.24, "c0", "D",
                   own["low"].to_numpy(float), own["high"].to_numpy(float),
                   tips=[f"fitted {v:+.3f}" for v in own["value"]], size=34),
        )  # fmt: skip
        shown = names if not panels else ("",) * len(names)
        x = Axis(QUANTITIES[target].name, "number", log=False)
        panels.append(Panel(x, Axis("", names=shown), series, neutral=0.0))
    return PlotFigure(
        "prior",
        "Exponents of the optimum: published laws, the prior that they make, and the fit",
        tuple(panels),
        height=0.65 + 0.5 * len(rows),
        key=("small grey: published laws", "square: the prior, 95 %", "diamond: fitted, 95 %"),
    )


# ---------------------------------------------------------------------- tables


def prior_rows(fits: Fits) -> list[dict[str, str]]:
    """The prior table as text."""
    rows = []
    for row in fits.prior_table.to_dict("records"):
        centre = row["coefficient"] == "at the centre"
        style = QUANTITIES[row["target"]].style if centre else "exponent"
        name = "at the centre" if centre else f"exponent of {EXPONENTS[row['coefficient']]}"
        spread = (
            f"\N{MULTIPLICATION SIGN}\N{DIVISION SIGN} {math.exp(row['prior_sd']):.2g}"
            if centre
            else f"\N{PLUS-MINUS SIGN} {row['prior_sd']:.2f}"
        )
        rows.append(
            {
                "dataset": row["dataset"],
                "target": QUANTITIES[row["target"]].name,
                "coefficient": name,
                "prior": f"{written(row['prior'], style)} {spread}",
                "value": estimated(row["value"], row["low"], row["high"], style=style),
                "moved": f"{row['moved']:+.1f}",
            }
        )
    return rows


def reading_rows(fits: Fits) -> list[dict[str, str]]:
    """Other ways to read the optima, beside the model."""
    if not fits.optima:
        return []
    table: pd.DataFrame = fits.readings
    rows = []
    for way, row in table.iterrows():
        reading = READINGS.get(str(way))
        rows.append(
            {
                "way": reading.summary if reading else "the model: all cells at once",
                "source": reading.source if reading else "",
                "interior": str(int(row["interior"])),
                **{t: _off(row[t]) if reading else "" for t in TARGETS},
                **{
                    f"{t}_{e}": written(row[f"{t}_{e}"], "exponent")
                    for t in TARGETS
                    for e in ("params", "tokens")
                },
            }
        )
    return rows


def _off(log_difference: float) -> str:
    """A median |ln| difference as a factor."""
    if not math.isfinite(log_difference):
        return written(None, "ratio")
    return f"\N{MULTIPLICATION SIGN}\N{DIVISION SIGN} {math.exp(log_difference):.2f}"


def ahead_rows(fits: Fits) -> list[dict[str, Any]]:
    """Every law of the loss that was tried, and how it did one level of compute ahead."""
    rows, seen = [], set()
    for name in fits.architectures:
        model = fits.loss_model(name)
        if id(model) in seen:
            continue
        seen.add(id(model))
        for score in model.scores:
            rows.append(
                {
                    "of": name,
                    "law": score.law.replace("_", " "),
                    "count": score.count.replace("_", " "),
                    "answers": model.law is not None and score.law == model.law.key,
                    "error": score.error,
                    "inside": f"{score.covered} of {score.runs}" if score.runs else "",
                    "why": score.why,
                }
            )
    return rows


def literature_rows(fits: Fits) -> list[dict[str, Any]]:
    """The published laws, and whether the prior is made of them."""
    return [
        {**law.to_dict(), "used": key in fits.prior.laws} for key, law in PUBLISHED_LAWS.items()
    ]
