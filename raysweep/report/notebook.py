"""What fits, recommendations, results and studies look like in Jupyter: tables and inline SVG.

No script and nothing from elsewhere. The colours follow the notebook's theme where it says which
one it is (JupyterLab, VS Code), else the system's; the background is always set with them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import singledispatch
from typing import Any

from markupsafe import Markup, escape

from raysweep.plan import make_plan, summary_words
from raysweep.report import reading_laws
from raysweep.report.compare_figures import ratios_figure
from raysweep.report.figures import PlotFigure, colours
from raysweep.report.losses import loss_figure
from raysweep.report.numbers import Numbers
from raysweep.report.optima import optima_figure
from raysweep.report.reading import answer_limits, extrapolation
from raysweep.report.style import DARK, LIGHT
from raysweep.report.trends import names_of, rests_on, rules_used
from raysweep.results.schema import FINISHED
from raysweep.results.store import Results
from raysweep.scaling.compare import Comparison
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import QUANTITIES
from raysweep.scaling.recommend import Recommendation
from raysweep.study import Study
from raysweep.text import NOTHING, short, written

MOST_ROWS = 24
"""Rows of a table; a notebook is no place for 200 cells."""

_LOOK = """
.raysweep { background: var(--paper); color: var(--ink); padding: 12px 16px; font: 14px/1.5 sans-serif; border: 1px solid var(--grid); border-radius: 4px; max-width: 1020px; }
.raysweep h4 { margin: 0 0 6px; font-size: 15px; color: var(--ink); }
.raysweep p { margin: 4px 0; color: var(--muted); }
.raysweep table { border-collapse: collapse; margin: 8px 0; background: none; color: var(--ink); font-size: 13px; }
.raysweep tr, .raysweep tbody tr:nth-child(odd), .raysweep tbody tr:hover { background: none; }
.raysweep th, .raysweep td { padding: 3px 16px 3px 0; text-align: left; border: 0; border-bottom: 1px solid var(--grid); background: none; color: var(--ink); font-weight: 400; }
.raysweep thead th { color: var(--muted); }
.raysweep .num { text-align: right; font-variant-numeric: tabular-nums; }
.raysweep .dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
.raysweep svg { display: block; max-width: 100%; height: auto; margin: 8px 0; }
"""  # noqa: E501


@singledispatch
def html_of(thing: object) -> str:
    """Small HTML that shows an object."""
    raise TypeError(f"nothing tells how {type(thing).__name__} looks in a notebook")


def _framed(*parts: object) -> str:
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in palette.items())
        for palette in (LIGHT, DARK)
    )
    style = (
        f".raysweep {{ {light} }}"
        f"@media (prefers-color-scheme: dark) {{ .raysweep {{ {dark} }} }}"
        f"[data-jp-theme-light=true] .raysweep, .vscode-light .raysweep {{ {light} }}"
        f"[data-jp-theme-light=false] .raysweep, .vscode-dark .raysweep {{ {dark} }}" + _LOOK
    )
    inner = Markup("").join(Markup(p) if isinstance(p, Markup) else escape(p) for p in parts)
    return f'<div class="raysweep"><style>{style}</style>{inner}</div>'


def _heading(text: object) -> Markup:
    return Markup("<h4>{}</h4>").format(text)


def _said(text: object) -> Markup:
    return Markup("<p>{}</p>").format(text)


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], numeric: int) -> Markup:
    """A table whose last `numeric` columns are numbers; the rows beyond `MOST_ROWS` are counted."""
    rows = list(rows)
    first = len(heads) - numeric

    def line(tag: str, cells: Sequence[object]) -> Markup:
        return Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup("<{0}{1}>{2}</{0}>").format(
                    Markup(tag), Markup(' class="num"') if k >= first else "", cell
                )
                for k, cell in enumerate(cells)
            )
        )

    more = len(rows) - MOST_ROWS
    body = Markup("").join(line("td", row) for row in rows[:MOST_ROWS])
    head = line("th", heads)
    note = _said(f"and {more} more") if more > 0 else ""
    table = Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(head, body)
    return table + note


def _figure(figure: PlotFigure | None) -> Markup:
    """A figure whose ids are its own, however many outputs a notebook has."""
    if figure is None:
        return Markup("")
    svg = figure.drawing.svg
    tag = hashlib.sha256(svg.encode()).hexdigest()[:6]
    svg = re.sub(r'(\bid="|url\(#|href="#)([^")]+)', rf"\g<1>\g<2>-{tag}", svg)
    return Markup(svg)


def _dot(shades: Mapping[str, str], name: str) -> Markup:
    return Markup('<span class="dot" style="background:var(--{})"></span>{}').format(
        shades[name], name
    )


@html_of.register
def _(fits: Fits) -> str:
    names = names_of(fits)
    shades = colours(names)
    numbers = Numbers(fits.to_dict())
    used = {name: rests_on(fits, name) for name in names}
    rules = {name: rules_used(fits, name, used[name]) for name in names}
    loss_laws = {name: law for name in names if (law := used[name].get("loss"))}
    cells = [
        (
            _dot(shades, str(row["architecture"])),
            name,
            str(row["status"]).replace("_", " "),
            written(row["params_active_non_embedding"], "params"),
            written(row["tokens"], "tokens"),
            written(row["n_finished"], "count"),
            written(row["learning_rate"], "rate"),
            written(row["batch_tokens"], "batch"),
            written(row["loss"], "loss"),
        )
        for name, row in zip(fits.cells.index, fits.cells.to_dict("records"), strict=True)
    ]
    laws = [
        (_dot(shades, str(row[0])), *row[1:]) for row in reading_laws.law_rows(fits, numbers, rules)
    ]
    return _framed(
        _heading(f"Fits of {len(fits.cells)} cells, {fits.n_rows} trials"),
        *(_said(message) for message in fits.messages),
        _table(("", "cell", "optimum", "N", "D", "trials", "lr*", "batch*", "loss"), cells, 6),
        _table(
            ("", "optimal", "law", "95 % of its exponents", "off on unseen cells", "cells"), laws, 2
        )
        if laws
        else "",
        _figure(optima_figure(fits, (), rules)),
        _figure(loss_figure(fits, (), loss_laws)),
    )


@html_of.register
def _(answer: Recommendation) -> str:
    model = f"{short(answer.params)} active non-embedding parameters"
    if answer.experts > 1:
        model += f", {answer.experts} experts, top-{answer.top_k}"
    sequences = (
        f" ({answer.batch_sequences} sequences of {answer.sequence_length})"
        if answer.batch_sequences
        else ""
    )
    rows = [
        ("learning rate", written(answer.learning_rate, "rate"),
         _span(answer.learning_rate_interval, "rate")),
        ("batch, tokens", written(answer.batch_tokens, "batch") + sequences,
         _span(answer.batch_tokens_interval, "batch")),
        ("expected loss", written(answer.loss, "loss"), _span(answer.loss_interval, "loss")),
    ]  # fmt: skip
    published = [
        (p["source"], _maybe(p["learning_rate"], "rate"), _maybe(p["batch_tokens"], "batch"))
        for p in answer.published
    ]
    return _framed(
        _heading(f"{answer.architecture}: {model}, {short(answer.tokens)} tokens"),
        _table(("", "", "95 %"), rows, 0),
        _said(f"{extrapolation(answer)}."),
        *(_said(f"Caution: {warning}") for warning in answer_limits(answer)),
        _table(("published laws", "learning rate", "batch"), published, 2) if published else "",
    )


def _span(interval: tuple[float, float], style: str) -> str:
    low, high = interval
    if not math.isfinite(low + high):
        return "no interval"
    return f"{written(low, style)} to {written(high, style)}"


def _maybe(value: object, style: str) -> str:
    return written(value, style) if isinstance(value, float) else NOTHING


@html_of.register
def _(results: Results) -> str:
    frame = results.frame()
    rows: list[Sequence[Any]] = []
    for (study, cell), own in frame.groupby(["study", "cell"], sort=False, dropna=False):
        finished = own[own["status"] == FINISHED]
        rows.append(
            (
                study,
                cell,
                written(float(len(own)), "count"),
                written(float(len(finished)), "count"),
                written(float(finished["loss"].min()), "loss") if len(finished) else NOTHING,
            )
        )
    return _framed(
        _heading(f"{len(frame)} trials in {len(rows)} cells"),
        _table(("study", "cell", "trials", "finished", "best loss"), rows, 3) if rows else "",
        *(_said(problem) for problem in results.problems),
    )


@html_of.register
def _(study: Study) -> str:
    plan = make_plan(study)
    rows = [
        (
            c.name,
            c.shape,
            short(c.params_active_non_embedding),
            short(c.tokens),
            str(c.trials),
            written(c.flops_per_trial, "flops"),
        )
        for c in plan.cells
    ]
    return _framed(
        _heading(f"Study {plan.study}"),
        _said(plan.description) if plan.description else "",
        _table(("cell", "shape", "N", "D", "trials", "FLOPs a trial"), rows, 4),
        _said(summary_words(plan)),
    )


@html_of.register
def _(comparison: Comparison) -> str:
    labels = [side.label for side in comparison.sides]
    shades = colours(labels)
    parts: list[object] = [
        _heading(" and ".join(labels)),
        _figure(ratios_figure(comparison, shades)),
    ]
    for pair in comparison.pairs:
        rows = [
            (f"{QUANTITIES[c.quantity].optimal} at equal {c.at_equal}", c.how,
             written(c.ratio, "number" if c.quantity == "loss" else "ratio"),
             _span((c.low, c.high), "number" if c.quantity == "loss" else "ratio"))
            for c in pair.contrasts
            if c.ok
        ]  # fmt: skip
        parts.append(_said(f"{pair.other} over {pair.reference}"))
        parts.append(_table(("", "by", "ratio", "95 %"), rows, 2))
        parts += [_said(f"Losses are not compared: {pair.apart}.")] if pair.apart else []
    return _framed(*parts)
