"""Commands for studies whose trials are trained elsewhere: ask, tell."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from raysweep.cli.common import ResultsOption, Set, Space, app, load_study
from raysweep.errors import UserError

NOTHING_NOW = 75
"""Exit code where all that is left waits on trials handed out (EX_TEMPFAIL)."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found:
        raise UserError(f"--expires {text}: write it as 90m, 24h or 3d")
    return float(found[1]) * _UNITS[found[2]]


@app.command("ask")
def ask_command(
    space: Space,
    results: ResultsOption = None,
    count: Annotated[int, typer.Option("-n", help="How many trials to get, at most.", min=1)] = 1,
    set_: Set = None,
    expires: Annotated[
        str,
        typer.Option(help="Give a trial up when it is not told within this time: 90m, 24h or 3d."),
    ] = "24h",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until there is a trial, or the study is done.")
    ] = False,
    shell: Annotated[
        bool, typer.Option("--shell", help="Print name=value words for the shell's eval, not JSON.")
    ] = False,
    retry_crashed: Annotated[
        bool, typer.Option("--retry-crashed", help="Try trials again, once, that crashed.")
    ] = False,
) -> None:
    """Get the next trials of a study to train anywhere: a JSON line each.

    Prints nothing once the study is done. Exit code 75: running trials must be told first."""
    from raysweep.search.sweep import Sweep, shell_words

    study, lifetime = load_study(space, set_), _seconds(expires)
    with Sweep(study, results, expires=lifetime, retry_crashed=retry_crashed) as sweep:
        first = sweep.ask(wait=wait)
        asked = [first, *(sweep.ask_many(count - 1) if count > 1 else [])] if first else []
        for trial in asked:
            values = {"id": trial.id} | {k: v for k, v in trial.settings.items() if k != "id"}
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
    trial: Annotated[
        str, typer.Argument(help="The trial's id, as 'ask' printed it.", metavar="ID")
    ],
    loss: Annotated[
        float | None, typer.Option(help="Final validation loss, in nats a token.")
    ] = None,
    diverged: Annotated[bool, typer.Option("--diverged", help="Its loss diverged.")] = False,
    failed: Annotated[
        str | None, typer.Option("--failed", help="It failed, and why.", metavar="WHY")
    ] = None,
    measured: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="Another number to keep: name=value. Repeatable.", metavar="NAME=X"
        ),
    ] = None,
    results: ResultsOption = None,
) -> None:
    """Tell how a trial from 'ask' ended, and write its row."""
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
