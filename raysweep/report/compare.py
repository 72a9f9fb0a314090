"""write_comparison(comparison, folder): two or more results on one self-contained HTML page."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from raysweep.report import reading_laws
from raysweep.report.compare_figures import gaps_figure, ratios_figure
from raysweep.report.figures import colours
from raysweep.report.losses import loss_figure
from raysweep.report.numbers import Numbers
from raysweep.report.optima import optima_figure
from raysweep.report.render import csv_text, relative, render, replace_file
from raysweep.report.style import DARK, LIGHT
from raysweep.report.trends import names_of, rests_on, rules_used
from raysweep.scaling.compare import Comparison, Pair
from raysweep.scaling.contrast import Contrast
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.quantities import QUANTITIES

SCRIPTS = ("common.js", "figures.js")
"""What the page runs, in order."""

LESS_AND_MORE = {
    "learning_rate": ("lower", "higher"),
    "batch_tokens": ("smaller", "larger"),
    "noise_scale_tokens": ("lower", "higher"),
    "loss": ("lower", "higher"),
    "tokens": ("fewer", "more"),
    "flops": ("fewer", "more"),
}


def write_comparison(
    comparison: Comparison,
    folder: str | os.PathLike[str],
    *,
    title: str | None = None,
    png: bool = False,
) -> Path:
    """Write `folder/index.html`, one file that needs nothing else, and return its path.

    Every number in it is one of `comparison.to_dict()`. With `png` the figures are written beside
    it."""
    data = comparison.to_dict()
    numbers = Numbers(data)
    merged = _merged(comparison)
    names = names_of(merged)
    shades = colours(names)
    used = {s.label: rests_on(s.fits, s.architecture) for s in comparison.sides}
    rules = {s.label: rules_used(s.fits, s.architecture, used[s.label]) for s in comparison.sides}
    loss_laws = {label: law for label in names if (law := used[label].get("loss"))}
    drawn = (
        ratios_figure(comparison, shades, png=png),
        optima_figure(merged, (), rules, png=png),
        loss_figure(merged, (), loss_laws, png=png) if _one_scale(comparison) else None,
        gaps_figure(comparison, shades, png=png),
    )
    figures = {f.name: f for f in drawn if f is not None}
    context = {
        "n": numbers,
        "title": title or " and ".join(_listed([s.label for s in comparison.sides])),
        "comparison": comparison,
        "sides": comparison.sides,
        "names": names,
        "colours": shades,
        "figures": figures,
        "pairs": [_pair(pair, i, numbers) for i, pair in enumerate(comparison.pairs)],
        "optima_rows": reading_laws.law_rows(merged, numbers, rules),
        "loss_rows": reading_laws.loss_law_rows(merged, numbers, loss_laws),
        "readings": {
            "optima": reading_laws.laws(merged, rules),
            "loss": reading_laws.loss(merged, numbers, loss_laws),
        },
        "csv": {name: csv_text(figure.data) for name, figure in figures.items()},
        "command": _command(comparison, folder, png),
        "light": LIGHT,
        "dark": DARK,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    page = target / "index.html"
    replace_file(page, render("compare.html", SCRIPTS, context).encode())
    for figure in figures.values():
        if figure.drawing.png:
            (target / f"{figure.name}.png").write_bytes(figure.drawing.png)
    return page


def _listed(names: Sequence[str]) -> list[str]:
    return [", ".join(names[:-1]), names[-1]]


def _merged(comparison: Comparison) -> Fits:
    """The sides as the architectures of one set of fits, for the figures; cells renamed apart."""
    cells, groups, optima, noise = [], {}, {}, []
    for side in comparison.sides:
        fits = side.fits
        names = {name: f"{side.label}: {name}" for name in fits.cells.index}
        own = fits.cells.rename(index=names).assign(architecture=side.label)
        cells.append(own)
        noise.append(fits.noise_scale.rename(index=names))
        for name, group in fits.groups.items():
            if name != ALL:
                groups[side.label] = replace(group, name=side.label, cells=own)
        optima |= {names[name]: o for name, o in fits.optima[fits.method].items()}
    first = comparison.sides[0].fits
    return replace(
        first,
        cells=pd.concat(cells),
        groups=groups,
        optima={first.method: optima},
        noise_scale=pd.concat(noise),
        comparison={},
        allocation={},
        efficiency={},
        surface=None,
    )


def _one_scale(comparison: Comparison) -> bool:
    """Whether all losses may stand in one figure."""
    return not any(pair.apart for pair in comparison.pairs)


def _pair(pair: Pair, index: int, n: Numbers) -> dict[str, Any]:
    """What the page says of one pair."""
    at = ("pairs", index, "contrasts")
    return {
        "pair": pair,
        "index": index,
        "says": _says(pair, n, at),
        "rows": [
            {
                "what": f"{QUANTITIES[c.quantity].optimal} at equal {c.at_equal}",
                "ratio": n(_style(c), (*at, k), "ratio"),
                "span": span(c, n, (*at, k)),
                "how": c.how,
                "cells": n("count", (*at, k), "n"),
                "why": "" if c.ok else c.message or c.status,
                "note": c.message if c.ok else "",
            }
            for k, c in enumerate(pair.contrasts)
        ],
    }


def span(c: Contrast, n: Numbers, at: tuple[object, ...]) -> Markup:
    """The interval of a contrast; one-sided where its upper end lies beyond any number."""
    if math.isfinite(c.low) and math.isinf(c.high):
        return Markup("at least {}").format(n(_style(c), at, "low"))
    return n.interval(_style(c), (at, "low"), (at, "high")) or Markup("no interval")


def _style(c: Contrast) -> str:
    """Losses differ by little."""
    return "number" if c.quantity == "loss" else "ratio"


def _says(pair: Pair, n: Numbers, at: tuple[object, ...]) -> list[Markup]:
    """The pair in sentences: what differs, what is not shown to, what is not compared."""
    said: list[Markup] = []
    same: list[Markup] = []
    for k, c in _chosen(pair):
        less, more = LESS_AND_MORE[c.quantity]
        word = QUANTITIES[c.quantity].optimal
        if not c.clear:
            same.append(Markup("{} ({})").format(word, span(c, n, (*at, k))))
            continue
        verb = "needs" if c.quantity in ("tokens", "flops") else "has"
        said.append(
            Markup("<b>{}</b> {} {} times the {} of <b>{}</b> at equal {} ({}): {}.").format(
                pair.other, verb, n(_style(c), (*at, k), "ratio"), word, pair.reference,
                c.at_equal, span(c, n, (*at, k)), less if c.ratio < 1 else more,
            )
        )  # fmt: skip
    if same:
        said.append(
            Markup("No difference is shown in: {}. That is not to say that there is none.").format(
                Markup("; ").join(same)
            )
        )
    if pair.apart:
        said.append(
            Markup("Losses of <b>{}</b> and <b>{}</b> are left out, and so is what equal loss "
                   "costs: {}.").format(pair.reference, pair.other, pair.apart)
        )  # fmt: skip
    elif not pair.cells:
        said.append(Markup("No two cells have the same <i>N</i> and <i>D</i>."))
    if pair.doubt:
        said.append(Markup("{}.").format(pair.doubt[:1].upper() + pair.doubt[1:]))
    return said


def _chosen(pair: Pair) -> list[tuple[int, Contrast]]:
    """One contrast a quantity, the first that could be had, for the sentences."""
    chosen: dict[str, tuple[int, Contrast]] = {}
    for k, c in enumerate(pair.contrasts):
        if c.ok:
            chosen.setdefault(c.quantity, (k, c))
    return list(chosen.values())


def _command(comparison: Comparison, folder: str | os.PathLike[str], png: bool) -> str:
    """The command that makes this page again."""
    parts = ["raysweep", "compare"]
    for asked in comparison.asked:
        uri, mark, study = asked.partition("#")
        parts.append(relative(uri) + mark + study)
    for name in comparison.architectures:
        parts += ["--architecture", name]
    parts += ["-o", relative(os.fspath(folder))]
    return shlex.join(parts + (["--png"] if png else []))
