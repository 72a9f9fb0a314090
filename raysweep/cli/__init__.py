"""The command line: a thin skin over the Python API, and the only place that composes the parts."""

from __future__ import annotations

import sys
from typing import Any

import typer

# Each adds its commands, in the order that --help shows.
from raysweep.cli import init, study  # noqa: F401

# isort: split
from raysweep.cli import asking  # noqa: F401

# isort: split
from raysweep.cli import analysis  # noqa: F401

# isort: split
from raysweep.cli import cluster  # noqa: F401

# isort: split
from raysweep.cli.common import app
from raysweep.errors import UserError, needs_search

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    debug = "--debug" in sys.argv[1:]
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted: run the same command again to continue", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if debug or error.filename is None:
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}: name another path", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        words = [w for w in sys.argv[1:] if not w.startswith("-")]
        said = needs_search(error, " ".join(["raysweep", *words[:1]]))
        if debug or said is None:
            raise
        typer.echo(f"error: {said}", err=True)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer keeps the class of its usage errors private
            _usage(error)
            sys.exit(2)
        if debug:
            raise
        reason = " ".join(str(error).split())[:300]
        typer.echo(
            f"error: unexpected {type(error).__name__}: {reason} (--debug shows where)", err=True
        )
        sys.exit(1)


def _usage(error: Any) -> None:
    """A mistyped command in one line, with what shows the right one; help where that was asked."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    asked = f"raysweep {context.info_name}" if context and context.parent else "raysweep"
    said = " ".join(error.format_message().split()).rstrip(".")
    typer.echo(f"error: {said} ('{asked} -h' shows how)", err=True)
