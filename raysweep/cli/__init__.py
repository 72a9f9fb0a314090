"""The command line: a thin skin over the Python API, and the only place that composes the parts."""

from __future__ import annotations

import sys

import typer

# Each adds its commands, in the order that --help shows.
from raysweep.cli import study  # noqa: F401

# isort: split
from raysweep.cli import analysis  # noqa: F401

# isort: split
from raysweep.cli import cluster  # noqa: F401

# isort: split
from raysweep.cli.common import app
from raysweep.errors import UserError

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to continue", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())[:300]
        typer.echo(
            f"error: unexpected {type(error).__name__}: {reason} (--debug shows where)", err=True
        )
        sys.exit(1)
