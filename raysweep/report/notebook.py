"""What fits, recommendations, results and studies look like in Jupyter: tables and inline SVG.

No script and nothing from elsewhere. The colours follow the notebook's theme where it says which
one it is (JupyterLab, VS Code), else the system's; the background is always set with them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from raysweep.report.answers import Answer
from raysweep.report.compare import ratios_figure
from raysweep.report.figure import PlotFigure, colours
from raysweep.report.laws import law_figures, law_rows
from raysweep.report.render import sentence
from raysweep.report.style import DARK, LIGHT
from raysweep.results.schema import FINISHED
from raysweep.study.plan import make_plan, summary_words
from raysweep.text import NOTHING, between, estimated, short, written

if TYPE_CHECKING:
    from raysweep.results.store import Results
    from raysweep.scaling.fits import Fits
    from raysweep.scaling.recommend import Recommendation
    from raysweep.study import Study

MAX_ROWS = 24
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


def html_of(thing: object) -> str:
    """Small HTML that shows an object."""
    for kind in type(thing).__mro__:
        if kind.__name__ in VIEWS:
            return VIEWS[kind.__name__](thing)
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
    """A table whose last `numeric` columns are numbers; the rows beyond `MAX_ROWS` are counted."""
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

    more = len(rows) - MAX_ROWS
    body = Markup("").join(line("td", row) for row in rows[:MAX_ROWS])
    head = line("th", heads)
    note = _said(f"and {more} more") if more > 0 else ""
    table = Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(head, body)
    return table + note


def _figure(figure: PlotFigure | None) -> Markup:
    """A figure whose ids are its own, however many outputs a notebook has."""
    if figure is None:
        return Markup("")
    svg = figure.draw().svg
    tag = hashlib.sha256(svg.encode()).hexdigest()[:6]
    svg = re.sub(r'(\bid="|url\(#|href="#)([^")]+)', rf"\g<1>\g<2>-{tag}", svg)
    return Markup(svg)


def _dot(shades: Mapping[str, str], name: str) -> Markup:
    return Markup('<span class="dot" style="background:var(--{})"></span>{}').format(
        shades[name], name
    )


def _fits(fits: Fits) -> str:
    shades = colours(fits.architectures)
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
        (
            row.name,
            row.of,
            row.formula,
            ", ".join(
                f"{s} {estimated(e, style='coefficient' if row.of == 'loss' else 'exponent')}"
                for s, e, _ in row.exponents
            ),
            row.held_out or NOTHING,
        )
        for row in law_rows(fits)
    ]
    return _framed(
        _heading(f"Fits of {len(fits.cells)} cells, {fits.n_rows} trials"),
        *(_said(sentence(message)) for message in fits.messages),
        _table(("", "cell", "optimum", "N", "D", "trials", "lr*", "batch*", "loss"), cells, 6),
        _table(("", "of", "law", "95 %", "held out"), laws, 0) if laws else "",
        *(_figure(f) for f in law_figures(fits, ())),
    )


def _recommendation(found: Recommendation) -> str:
    model = f"{short(found.params)} active non-embedding parameters"
    if found.experts > 1:
        model += f", {found.experts} experts, top-{found.top_k}"
    sequences = (
        f" ({found.batch_sequences} sequences of {found.sequence_length})"
        if found.batch_sequences
        else ""
    )
    share = written(found.within, "percent")
    rows = [
        ("learning rate", written(found.learning_rate, "rate"),
         between(*found.learning_rate_interval, "rate")),
        ("batch, tokens", written(found.batch_tokens, "batch") + sequences,
         between(*found.batch_tokens_interval, "batch")),
        ("expected loss", written(found.loss, "loss"), between(*found.loss_interval, "loss")),
        (f"largest batch for {share} more loss", written(found.largest_batch, "batch"), ""),
    ]  # fmt: skip
    published = [
        (p["source"], _maybe(p["learning_rate"], "rate"), _maybe(p["batch_tokens"], "batch"))
        for p in found.published
    ]
    answer = Answer(found, True)
    return _framed(
        _heading(f"{found.architecture}: {model}, {short(found.tokens)} tokens"),
        _table(("", "", "95 %"), rows, 0),
        _said(sentence(": ".join(part for part in (answer.verdict, answer.outside) if part))),
        # The line above says how far it extrapolates.
        *(_said(sentence(w)) for w in found.warnings if not w.startswith("a long extrapolation")),
        _table(("published laws", "learning rate", "batch"), published, 2) if published else "",
    )


def _maybe(value: object, style: str) -> str:
    return written(value, style) if isinstance(value, float) else NOTHING


def _results(results: Results) -> str:
    frame = results.to_pandas()
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


def _study(study: Study) -> str:
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


def _comparison(comparison: Any) -> str:
    """Of arms, what each recommends at one size, and the ratios of each over the first."""
    names = [arm.name for arm in comparison.arms]
    shades = colours(names)
    sides = [
        (_dot(shades, name), *a.cells(), written(a.run.compute, "flops"))
        for name, a in comparison.answers.items()
    ]
    parts: list[object] = [_heading(" and ".join(names))]
    if sides:
        n, d = comparison.size
        parts.append(_said(f"At {short(n)} active parameters and {short(d)} tokens, 95 %"))
        parts.append(_table(("", "learning rate", "batch", "loss", "FLOPs"), sides, 0))
    parts += [_said(sentence(text)) for text in comparison.apart.values()]
    parts.append(_figure(ratios_figure(comparison.ratios, names)))
    for name, ratios in comparison.ratios.items():
        rows = [(r.name, r.said) for r in ratios if r.ok]
        parts.append(_table((f"{name} over {names[0]}", "ratio"), rows, 0))
    return _framed(*parts)


VIEWS: dict[str, Callable[[Any], str]] = {
    "Fits": _fits,
    "Recommendation": _recommendation,
    "Results": _results,
    "Study": _study,
    "Comparison": _comparison,
}
"""By the name of the class: a view loads nothing of what it shows."""
