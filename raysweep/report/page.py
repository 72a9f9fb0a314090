"""report(results, folder): one self-contained HTML page from a results folder."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.errors import UserError
from raysweep.report import budgets, claims, facts, measured, serving, trust
from raysweep.report.answers import Answer, Asked, answer_grid, ask
from raysweep.report.compare import ratio_rows
from raysweep.report.figure import PlotFigure, by_name, colours
from raysweep.report.forecast import forecast_rows, forecast_words
from raysweep.report.interactive import packed_figures
from raysweep.report.laws import LawRow, group_rows, law_figures, law_rows, names_of
from raysweep.report.render import figure_context, relative, render, write_page
from raysweep.report.surfaces import GAPS, CellFigure, cell_figures, drawn_of, picture
from raysweep.report.trials import MAX_ROWS, trial_table
from raysweep.results.columns import with_loss
from raysweep.results.store import Results
from raysweep.scaling.compute.serving import settings_of
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.summary import hyperparameter_sentences
from raysweep.text import written

LARGEST = 4_000_000
"""Bytes that the page should not exceed."""

FOLDER = "reports"
"""Where a page goes that nobody names a folder for, in one of its study's name."""

SCRIPTS = (
    "common.js",
    "address.js",
    "figures.js",
    "plots.js",
    "answer.js",
    "parallel.js",
    "page.js",
)
"""What the page runs, in order."""

_STUDY = re.compile(r'<meta name="raysweep-study" content="([^"]*)">')


def report(
    results: Results,
    folder: str | os.PathLike[str] | None = None,
    *,
    fits: Fits | None = None,
    title: str | None = None,
    png: bool = False,
    live: Mapping[str, Any] | None = None,
    asked: Asked = (),
) -> Path:
    """Fit the results and write `folder/index.html`, one file that needs nothing else.

    Args:
        results: an open results folder, in any state: the page says what it does not support.
        folder: where to; by default `reports/STUDY`.
        fits: those of these results, where they have been made already.
        title: stands for the names of the studies.
        png: write each figure beside the page too, as `folder/NAME.png`.
        live: what `watch` adds to a page that it keeps up to date.
        asked: (params, tokens) of runs to answer for first, as in [("7B", "1.4T")].

    Returns the page's path.

    Raises:
        UserError: the folder holds the page of another study; or a size that is no number.
    """
    frame = results.to_pandas()
    studies = facts.studies(frame, results.search_spaces())
    names = [str(s["name"]) for s in studies]
    target = Path(folder) if folder is not None else Path(FOLDER) / _file_name(names)
    _refuse_another(target / "index.html", names)
    fits = fit(results) if fits is None else fits
    frame = with_loss(frame, fits.of_loss) if fits.of_loss else frame
    context, drawn, shown = _context(results, frame, fits, studies, asked)
    context |= {
        "title": title or _title(names),
        "study": _key(names),
        "live": live,
        "command": _command(results.uri, target, png, asked, fits.options),
    }
    html = ""
    for most in (MAX_ROWS, 2000, 200):  # the table of trials is what grows without bound
        trials = trial_table(frame, results.curves(), fits, most)
        rows = (
            {str(key): i for i, key in enumerate(trials["columns"][0]["values"])}
            if trials["shown"]
            else {}
        )
        context |= {"trials": trials, "packed": packed_figures(shown, rows)}
        html = render("page.html", SCRIPTS, context)
        if len(html.encode()) <= LARGEST:
            break
    return write_page(target, html, drawn if png else ())


def _context(
    results: Results,
    frame: pd.DataFrame,
    fits: Fits,
    studies: Sequence[Mapping[str, Any]],
    asked: Asked,
) -> tuple[dict[str, Any], list[PlotFigure], list[PlotFigure]]:
    """What the template says but for the trials, the figures under names of files, and as shown."""
    answers = ask(fits, studies, asked)
    split = budgets.splits(fits)
    served = serving.serve(fits, settings_of(results.search_spaces()), answers)
    cells = cell_figures(fits)
    laws = law_figures(fits, answers)
    figures = by_name(
        [
            *laws,
            trust.held_out_figure(fits),
            trust.prior_figure(fits),
            budgets.split_figure(fits, split),
            *serving.figures(fits, served),
            claims.along_figure(fits),
            measured.noise_figure(fits),
            measured.load_figure(fits),
        ]
    )
    names = fits.architectures
    runs = facts.runs_table(results.runs())
    missing = trust.not_determined(fits) + split.missing + measured.not_measured(fits)
    missing += [("cost of serving", served.why)] if served.why else []
    context = figure_context(figures) | {
        "fits": fits,
        "names": names,
        "shown": names_of(fits),
        "colours": colours(names),
        "studies": studies,
        "left_out": sum(fits.left_out.values()),
        "totals": facts.totals(frame),
        "answers": answers,
        "chips": _chips(answers),
        "side": _side_by_side(fits, answers),
        "grid": answer_grid(fits, answers),
        "laws": [f.name for f in laws],
        "law_tables": _law_tables(fits),
        "groups": group_rows(fits),
        "ratio_rows": {name: ratio_rows(own) for name, own in fits.comparison.items()},
        "cell_figures": [(c, picture(c, whole=c is cells[-1]).draw().svg) for c in cells],
        "cells_drawn": drawn_of(fits),
        "gaps": GAPS,
        "checks": trust.checks(fits),
        "missing": missing,
        "prior_rows": trust.prior_rows(fits),
        "literature": trust.literature_rows(fits),
        "readings": trust.reading_rows(fits),
        "ahead": trust.ahead_rows(fits),
        "parabolas": "budgets" in figures
        and "parabolas" in " ".join(s.name for p in figures["budgets"].panels for s in p.series),
        "split_rows": budgets.split_rows(split),
        "forecast_rows": forecast_rows(*results.forecast()),
        "forecast_said": forecast_words(*results.forecast()),
        "claim_rows": claims.claim_rows(fits),
        "exponent_rows": claims.exponent_rows(fits),
        "serving": serving.words(served),
        "serving_rows": serving.rows(served),
        "hyperparameters": hyperparameter_sentences(fits),
        "noise_rows": measured.noise_rows(fits),
        "runs": runs,
        "utilisation": facts.utilisation(runs),
        "failures": facts.failures(frame),
        "provenance": facts.provenance(frame, results.runs()),
        "problems": results.problems,
        "data_results": relative(results.uri),
    }
    shown = [*figures.values(), *(c.figure for c in cells)]
    return context, [*figures.values(), *_named(cells)], shown


def _side_by_side(fits: Fits, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Every architecture at the N and D of the first answer."""
    if not answers:
        return []
    first = answers[0].run
    rows = []
    for name in fits.architectures:
        known = [a.run for a in answers if a.run.architecture == name]
        same = [r for r in known if (r.params, r.tokens) == (first.params, first.tokens)]
        found = same[0] if same else fits.recommend(name, first.params, first.tokens)
        rows.append({"name": name, "run": found})
    return rows


def _law_tables(fits: Fits) -> list[tuple[str, list[LawRow]]]:
    """The laws of size, and folded below them those of the loss reached."""
    rows = law_rows(fits)
    by_loss = [row for row in rows if row.of.endswith("by loss")]
    return [("Laws", [r for r in rows if r not in by_loss]), ("As laws of the loss", by_loss)]


def _chips(answers: Sequence[Answer]) -> list[tuple[str, ...]]:
    """(N, D, architecture) of each size asked about, as the form takes them."""
    found: dict[tuple[str, str], str] = {}
    for a in answers:
        size = written(a.run.params, "params"), written(a.run.tokens, "tokens")
        found.setdefault(size, a.run.architecture)
    return [(*size, name) for size, name in found.items()]


def _named(cells: Iterable[CellFigure]) -> list[PlotFigure]:
    """The figures of cells with the names of their cells, fit for file names."""
    found = []
    for c in cells:
        safe = "".join(x if x.isalnum() or x in "-_." else "_" for x in c.cell)
        found.append(replace(c.figure, name=f"cell-{safe}"[:120]))
    return found


def _title(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def folder_of(results: Results) -> Path:
    """`reports/STUDY`, by the first study of the results."""
    studies = facts.studies(results.to_pandas(), results.search_spaces())
    return Path(FOLDER) / _file_name([str(s["name"]) for s in studies])


def _file_name(names: Sequence[str]) -> str:
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", names[0] if names else "").strip("._")
    return safe or "results"


def _key(names: Sequence[str]) -> str:
    """What says in a page which studies it is of."""
    return "|".join(re.sub(r'[|"<>&]', "_", n) for n in names)


def _refuse_another(page: Path, names: Sequence[str]) -> None:
    """Raises UserError where a page of other studies stands there."""
    try:
        with page.open(encoding="utf-8") as file:
            found = _STUDY.search(file.read(4000))
    except OSError:
        return
    there = set(found[1].split("|")) - {""} if found else set()
    if there and names and not there & set(_key(names).split("|")):
        raise UserError(
            f"{page.parent} holds the report of {', '.join(sorted(there))}: name another folder"
        )


def _command(uri: str, folder: Path, png: bool, asked: Asked, options: Sequence[str] = ()) -> str:
    """The command that makes this page again, with paths as short as they can be said."""
    parts = ["raysweep", "report", relative(uri), "-o", relative(os.fspath(folder))]
    for params, tokens in asked:
        parts += ["--for", f"{params}@{tokens}"]
    return shlex.join([*parts, *options, *(["--png"] if png else [])])
