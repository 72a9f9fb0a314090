"""What the commands share: the app, argument types, and the way errors end it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raysweep.cli import complete
from raysweep.errors import UserError
from raysweep.text import read_size

if TYPE_CHECKING:
    from raysweep.scaling.fits import Fits
    from raysweep.study import Study

app = typer.Typer(
    help="Find the learning rate and batch size for a dense or MoE language model of N parameters "
    "on D tokens, and the loss it will reach.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Space = Annotated[
    Path,
    typer.Argument(
        help="Search-space file (YAML).", metavar="SPACE", autocompletion=complete.spaces
    ),
]
ResultsArgument = Annotated[
    str,
    typer.Argument(
        help="Results folder, or its URI (s3://, gs://).",
        metavar="RESULTS",
        autocompletion=complete.results,
    ),
]
ResultsOption = Annotated[
    str | None,
    typer.Option(
        "--results",
        help="Results folder or URI. Default: results/STUDY.",
        metavar="URI",
        autocompletion=complete.results,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change a key of the file for this call: dotted.key=value. Repeatable."
    ),
]
Group = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        help="Columns or recipe keys in which the runs differ, such as optimizer. Each value gets "
        "its own optimum and loss level. Repeatable.",
        metavar="COLUMN,...",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        help="Use only the rows for which this holds: 'optimizer == \"adamw\" and tokens > 1e9'.",
        metavar="CONDITION",
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        help="Columns or recipe keys whose effect is taken off the losses first, such as "
        "weight_decay. Repeatable.",
        metavar="COLUMN,...",
    ),
]
OfLoss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="Named validation set whose loss to fit (columns loss.NAME), or ema for that of "
        "averaged weights; default: the one that was minimised.",
        metavar="NAME",
    ),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        help="Published laws that the fit leaves out. Repeatable.",
        metavar="KEY,...",
        autocompletion=complete.published_laws,
    ),
]
Literature = Annotated[
    list[str] | None,
    typer.Option(
        "--literature",
        help="Start from these published laws only. Repeatable.",
        metavar="KEY,...",
        autocompletion=complete.published_laws,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"raysweep {version('raysweep')}")
        except PackageNotFoundError:
            typer.echo("raysweep, not installed: run from its sources")
        raise typer.Exit


def size(text: str) -> float:
    """Parameters or tokens of a run as people write them: 7e9, 7B, 1.4T; 7 alone is asked
    about."""
    try:
        return read_size(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and debug messages.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("raysweep")
    log.setLevel(level)
    log.handlers = [handler]


def load_study(space: Path, overrides: list[str] | None) -> Study:
    from raysweep.study import Study

    return Study.load(space, overrides or ())


def listed(given: list[str] | None) -> list[str]:
    """The values of an option that may be repeated, and hold several with commas."""
    return [part.strip() for text in given or () for part in text.split(",") if part.strip()]


def published(without: list[str] | None, literature: list[str] | None) -> dict[str, Any]:
    """The options on published laws, as `fit` takes them: None where they were not given."""
    return {"without": listed(without) or None, "literature": listed(literature) or None}


def fit_results(
    uri: str,
    group: list[str] | None = None,
    without: list[str] | None = None,
    literature: list[str] | None = None,
    where: str | None = None,
    also: list[str] | None = None,
    loss: str | None = None,
) -> Fits:
    from raysweep.results import Results
    from raysweep.scaling.fits import fit

    results = Results.open(uri)
    fits = fit(
        results,
        group=listed(group),
        where=where,
        also=listed(also),
        loss=loss,
        **published(without, literature),
    )
    for problem in results.problems:
        typer.echo(f"warning: {problem}", err=True)
    return fits


def watch_report(uri: str, folder: Path, *, png: bool = False, until_eof: bool = False) -> None:
    """Keep a report live until the run ends, or Ctrl-C; for another process, at low priority."""
    from raysweep.report import watch
    from raysweep.report.write import check_folder
    from raysweep.results import Results

    check_folder(folder)
    Results.open(uri)
    if until_eof:
        os.nice(19)
    else:
        page = (folder / "index.html").resolve()
        typer.echo(f"live: {page.as_uri()}  (Ctrl-C ends it; the page stays)", err=True)
    say = partial(typer.echo, err=True)
    try:
        pause = watch.until_eof if until_eof else None
        typer.echo(str(watch.watch(uri, folder, png=png, pause=pause, say=say)))
    except KeyboardInterrupt:
        typer.echo(f"no longer live: {folder / 'index.html'}", err=True)


@contextmanager
def live_report(uri: str, folder: Path, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """Keep a report live for the time of the block, and say where it is.

    Unless told, not in CI, where it would cost what nobody sees.
    Yields a function to call before the last page is written.
    """
    if wanted is None:
        wanted = not os.environ.get("CI")
    if not wanted:
        yield lambda: None
        return
    from raysweep.report.watch import kept_live

    with kept_live(uri, folder) as settle:
        page = (folder / "index.html").resolve()
        typer.echo(f"live report, in a moment: {page.as_uri()}", err=True)
        yield settle
