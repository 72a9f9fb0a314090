"""report(results, folder): one self-contained HTML page from a results folder."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.report import (
    facts,
    reading,
    reading_budgets,
    reading_checks,
    reading_kinds,
    reading_laws,
)
from raysweep.report.budgets import budget_figure
from raysweep.report.calculator import calculator
from raysweep.report.figures import colours
from raysweep.report.heldout import heldout_figure
from raysweep.report.kinds import load_figure, noise_figure
from raysweep.report.losses import comparison_figure, loss_figure
from raysweep.report.numbers import Numbers
from raysweep.report.optima import optima_figure
from raysweep.report.render import csv_text, relative, render, replace_file
from raysweep.report.serving import KINDS, WORDS, serve, serving_figure
from raysweep.report.style import DARK, LIGHT
from raysweep.report.surfaces import GAPS, CellFigure, cell_figures, dots_of
from raysweep.report.trends import names_of, rests_on, rules_used
from raysweep.report.trials import trial_table
from raysweep.report.variants import variants_figure
from raysweep.results.store import Results
from raysweep.scaling import cautions
from raysweep.scaling.cells import cell_table
from raysweep.scaling.compute.allocation import OUTSIDE
from raysweep.scaling.fits import ALL, Fits, fit

LARGEST = 3_000_000
"""Bytes that the page should not exceed."""

SCRIPTS = ("common.js", "figures.js", "calculator.js", "ask.js", "page.js")
"""What the page runs, in order."""


def report(
    results: Results,
    folder: str | os.PathLike[str],
    *,
    fits: Fits | None = None,
    title: str | None = None,
    png: bool = False,
    live: Mapping[str, Any] | None = None,
) -> Path:
    """Fit the results and write `folder/index.html`, one file that needs nothing else.

    `fits` are those of these results, where they have been made already; `title` stands for the
    names of the studies. With `png`, each figure is written beside it too, as `folder/NAME.png`.
    `live` is what `watch` adds to a page that it keeps up to date.
    Returns the page's path. A results folder in any state gives a page, which says what the
    results do not support.
    """
    frame = results.frame()
    fits = fit(frame) if fits is None else fits
    context, drawings = _context(results, frame, fits, png)
    context["title"] = title or _title(context["studies"])
    context["live"] = live
    context["command"] = _command(results.uri, folder, png)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    page = target / "index.html"
    html = render("page.html", SCRIPTS, context).encode()
    for rows in (2000, 200):  # the table of trials is what grows without bound
        if len(html) <= LARGEST:
            break
        context["trials"] = trial_table(frame, results.curves(), fits, rows)
        html = render("page.html", SCRIPTS, context).encode()
    replace_file(page, html)
    for name, image in drawings.items():
        (target / f"{name}.png").write_bytes(image)
    return page


def _context(
    results: Results, frame: pd.DataFrame, fits: Fits, png: bool
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything that the template says, and the PNG images by name."""
    studies = facts.studies(frame, results.search_spaces())
    advice = facts.advise(fits, studies)
    answers = [a.answer for a in advice]
    served = serve(fits, answers)
    data = {
        **fits.to_dict(),
        "answers": [a.to_dict() for a in answers],
        "serving": served.data,
    }
    numbers = Numbers(data)
    names = names_of(fits)
    used = {name: rests_on(fits, name) for name in names}
    rules = {name: rules_used(fits, name, used[name]) for name in names}
    loss_laws = {name: law for name in names if (law := used[name].get("loss"))}
    table = cell_table(frame)
    cells = cell_figures(fits, table, png=png)
    figures = {
        figure.name: figure
        for figure in (
            optima_figure(fits, answers, rules, png=png),
            loss_figure(fits, answers, loss_laws, png=png),
            budget_figure(fits, png=png),
            comparison_figure(fits, png=png),
            noise_figure(fits, png=png),
            load_figure(fits, png=png),
            serving_figure(served, png=png),
            heldout_figure(fits, png=png),
            variants_figure(fits, png=png),
        )
        if figure is not None
    }
    runs = facts.runs_table(results.runs())
    trials = trial_table(frame, results.curves(), fits)
    context = {
        "n": numbers,
        "data": data,
        "fits": fits,
        "ALL": ALL,
        "studies": studies,
        "answers": _answers(fits, advice),
        "names": names,
        "colours": colours(names),
        "kinds": {name: fits.groups[name].kind for name in names},
        "totals": facts.totals(frame),
        "cell_figures": _by_architecture(cells, names),
        "gaps": GAPS,
        "figures": figures,
        "readings": {
            "surfaces": reading.surfaces(fits, len(cells), dots_of(len(cells))),
            "optima": reading_laws.laws(fits, rules),
            "loss": reading_laws.loss(fits, numbers, loss_laws),
            "budgets": reading_budgets.budgets(fits, numbers),
            "comparison": reading.comparison(fits, numbers),
            "efficiency": reading_kinds.efficiency(fits, numbers),
            "noise": reading_kinds.noise(fits, numbers),
            "load": reading_kinds.load(fits),
            "serving": reading_budgets.serving(served, numbers),
            "checks": reading.checks(fits, numbers),
            "heldout": reading_checks.heldout(fits, numbers),
            "variants": reading_checks.variants(fits),
        },
        "laws": reading_laws.law_rows(fits, numbers, rules),
        "loss_laws": reading_laws.loss_law_rows(fits, numbers, loss_laws),
        "budgets": reading_budgets.budget_rows(fits, numbers),
        "outside": f"{OUTSIDE:g}",
        "serving": reading_budgets.serving_rows(served, numbers),
        "serving_kinds": [WORDS[kind] for kind in KINDS],
        "kinds_title": reading_kinds.kinds_title(fits),
        "checks": reading_laws.check_rows(fits, numbers),
        "variants": reading_checks.variant_rows(fits, numbers),
        "methods": reading_laws.method_rows(fits, numbers),
        "runs": runs,
        "utilisation": facts.utilisation(runs),
        "failures": facts.failures(frame),
        "provenance": facts.provenance(frame, results.runs()),
        "problems": results.problems,
        "calculator": calculator(fits),
        "trials": trials,
        "csv": {name: csv_text(figure.data) for name, figure in figures.items()},
        "light": LIGHT,
        "dark": DARK,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    images = _images(cells, figures.values()) if png else {}
    return context, images


def _answers(fits: Fits, advice: Sequence[facts.Advice]) -> list[dict[str, Any]]:
    return [
        {
            "answer": a.answer,
            "named": a.named,
            "law": math.isfinite(a.answer.learning_rate),
            "cell": fits.cells.index.get_loc(a.best_cell) if a.best_cell else None,
            "at": ("answers", i),
            "reach": reading.extrapolation(a.answer),
            "far": bool(cautions.far(a.answer.extrapolation)),
            "limits": reading.answer_limits(a.answer) if fits.optima[fits.method] else [],
        }
        for i, a in enumerate(advice)
    ]


def _by_architecture(
    cells: Sequence[CellFigure], names: Sequence[str]
) -> dict[str, list[CellFigure]]:
    grouped = {name: [c for c in cells if c.architecture == name] for name in names}
    return {name: own for name, own in grouped.items() if own}


def _images(cells: Sequence[CellFigure], figures: Any) -> dict[str, bytes]:
    images = {f.name: f.drawing.png for f in figures if f.drawing.png}
    for cell in cells:
        if cell.drawing.png:
            safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in cell.cell)
            images[f"cell-{safe}"] = cell.drawing.png
    return images


def _title(studies: Sequence[Mapping[str, Any]]) -> str:
    names = [str(s["name"]) for s in studies]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _command(uri: str, folder: str | os.PathLike[str], png: bool) -> str:
    """The command that makes this page again, with paths as short as they can be said."""
    parts = ["raysweep", "report", relative(uri), "-o", relative(os.fspath(folder))]
    return shlex.join(parts + (["--png"] if png else []))
