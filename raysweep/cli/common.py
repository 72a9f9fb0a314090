"""What the commands share: the app, argument types, and the way errors end it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from raysweep.config import Study

app = typer.Typer(
    help="Which learning rate and batch size for a dense or MoE model of N parameters on D tokens, "
    "and what loss will it reach?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Space = Annotated[Path, typer.Argument(help="Search-space file (YAML).", metavar="SPACE")]
ResultsArgument = Annotated[
    str, typer.Argument(help="Results folder or URI (s3://, gs://).", metavar="RESULTS")
]
ResultsOption = Annotated[
    str | None,
    typer.Option("--results", help="Results folder or URI; default: results/STUDY.", metavar="URI"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the file: dotted.key=value. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("raysweep")
    log.setLevel(level)
    log.handlers = [handler]


def load_study(space: Path, overrides: list[str] | None) -> Study:
    from raysweep.config import Study

    return Study.load(space, overrides or ())


def fit_results(uri: str) -> Any:
    from raysweep.results import Results
    from raysweep.scaling.fits import fit

    results = Results.open(uri)
    fits = fit(results.frame())
    for problem in results.problems:
        typer.echo(f"warning: {problem}", err=True)
    return fits


def write_report(uri: str, folder: Path, *, png: bool = False) -> Path:
    from raysweep.report import report
    from raysweep.results import Results

    return report(Results.open(uri), folder, png=png)
