"""Commands for studies whose trials are trained elsewhere: ask, tell."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Annotated, Any

import typer

from raysweep.cli.common import ResultsOption, Set, Space, app, load_study
from raysweep.errors import UserError

NOTHING_NOW = 75
"""Exit code where all that is left waits on trials handed out (EX_TEMPFAIL)."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _lifetime(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found:
        raise UserError(f"--expires {text}: write it as 90m, 24h or 3d")
    return timedelta(seconds=float(found[1]) * _UNITS[found[2]])


@app.command("ask")
def ask_command(
    space: Space,
    results: ResultsOption = None,
    count: Annotated[int, typer.Option("-n", help="Trials to hand out, at most.", min=1)] = 1,
    set_: Set = None,
    expires: Annotated[
        str, typer.Option(help="Time after which a trial that was not told is given up.")
    ] = "24h",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for a trial, or for the study to be done.")
    ] = False,
    shell: Annotated[
        bool, typer.Option("--shell", help="Print name=value words for eval, not JSON.")
    ] = False,
    retry_crashed: Annotated[
        bool, typer.Option("--retry-crashed", help="Try cells again whose trials crashed.")
    ] = False,
) -> None:
    """Hand out a study's next trials, a JSON line each, to be trained anywhere.

    Prints nothing once the study is done; exit code 75 where others must be told first."""
    from raysweep.search.sweep import Sweep, shell_words

    study, lifetime = load_study(space, set_), _lifetime(expires)
    with Sweep(study, results, expires=lifetime, retry_crashed=retry_crashed) as sweep:
        first = sweep.ask(wait=wait)
        asked = [first, *(sweep.ask_many(count - 1) if count > 1 else [])] if first else []
        for trial in asked:
            values = {"id": trial.id, **trial.settings}
            typer.echo(shell_words(list(values.items())) if shell else json.dumps(values))
        if not asked:
            done = sweep.done
            typer.echo(
                f"{study.name}: {'all trials are done' if done else 'nothing now: others run'}",
                err=True,
            )
            raise typer.Exit(0 if done else NOTHING_NOW)


@app.command("tell")
def tell_command(
    trial: Annotated[str, typer.Argument(help="Id that 'ask' printed.", metavar="ID")],
    loss: Annotated[float | None, typer.Option(help="Final validation loss, nats a token.")] = None,
    diverged: Annotated[bool, typer.Option("--diverged", help="Its loss ran away.")] = False,
    failed: Annotated[
        str | None, typer.Option("--failed", help="Why it has no loss.", metavar="WHY")
    ] = None,
    measured: Annotated[
        list[str] | None,
        typer.Option("--with", help="Further number: name=value. Repeatable.", metavar="NAME=X"),
    ] = None,
    results: ResultsOption = None,
) -> None:
    """Tell how a trial ended that 'ask' handed out; its row is written."""
    from raysweep.results.pending import Status, tell

    if sum((loss is not None, diverged, failed is not None)) != 1:
        raise UserError("say one of --loss X, --diverged and --failed WHY")
    status: Status = "diverged" if diverged else "crashed" if failed is not None else "finished"
    more: dict[str, Any] = {}
    for text in measured or ():
        name, equals, value = text.partition("=")
        try:
            more[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip().isidentifier():
            raise UserError(f"--with {text}: write it as name=number")
    reason = failed if failed is not None else "told so" if diverged else None
    row = tell(trial, results_uri=results, loss=loss, status=status, reason=reason, **more)
    typer.echo(f"{row['cell']}: {row['status']}", err=True)
