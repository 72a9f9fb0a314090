"""Commands for a Ray cluster: submit, status, logs, stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysweep.cli.common import AsJson, Set, Space, app
from raysweep.errors import UserError

if TYPE_CHECKING:
    from raysweep.cluster.jobs import Jobs

DEFAULT_JOBS = "http://127.0.0.1:8265"
JobsAddress = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="Address of the cluster's Ray Jobs.",
        metavar="http://HEAD:8265",
    ),
]
JobArgument = Annotated[str, typer.Argument(help="Job, as 'raysweep status' lists it.")]


@app.command("submit")
def submit_command(
    space: Space,
    results: Annotated[
        str, typer.Option("--results", help="Results URI that every node can reach.", metavar="URI")
    ],
    address: JobsAddress = DEFAULT_JOBS,
    set_: Set = None,
    env_file: Annotated[
        Path | None,
        typer.Option(help="File of KEY=VALUE lines: environment variables for the study."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show the study's output until it ends.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="All nodes share this local results folder.")
    ] = False,
) -> None:
    """Send a study to a Ray cluster and start it there. Submit again to continue."""
    from raysweep.cluster.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.submit(space, results, overrides=set_ or (), env_file=env_file, allow_local=yes)
    typer.echo(f"submitted {job}")
    if wait:
        _follow(jobs, job)
        typer.echo(f"done: 'raysweep report {results} -o DIR' writes the report here")
    else:
        typer.echo(f"follow it with 'raysweep logs {job} -f --address {address}'")


@app.command("status")
def status_command(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A job, or a results folder or URI. Default: all jobs.", metavar="[JOB|RESULTS]"
        ),
    ] = None,
    address: JobsAddress = DEFAULT_JOBS,
    as_json: AsJson = False,
) -> None:
    """Show the studies on a cluster, or how far a study is."""
    from raysweep.cluster import jobs
    from raysweep.results import progress

    if what is not None and not what.startswith(("raysweep-", "raysubmit_")):
        cells, studies = progress.status(what)
        if as_json:
            found = {"cells": [cell.to_dict() for cell in cells], "studies": studies}
            typer.echo(json.dumps(found, indent=1))
        else:
            typer.echo(progress.render(cells, studies))
        return
    cluster = jobs.Jobs(address)
    found = [jobs.describe(j) for j in ([cluster.get(what)] if what else cluster.all())]
    for job in [] if as_json else found:
        typer.echo("  ".join(f"{v}" for v in job.values() if v not in (None, "")))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif not found:
        typer.echo(f"no studies at {address}")


@app.command("logs")
def logs_command(
    job: JobArgument,
    address: JobsAddress = DEFAULT_JOBS,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the study ends.")
    ] = False,
) -> None:
    """Show the output of a submitted study."""
    from raysweep.cluster.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    else:
        typer.echo(jobs.logs(job), nl=False)


@app.command("stop")
def stop_command(job: JobArgument, address: JobsAddress = DEFAULT_JOBS) -> None:
    """Stop a submitted study. Its results stay; submit it again to continue."""
    from raysweep.cluster.jobs import Jobs

    stopped = Jobs(address).stop(job)
    typer.echo(f"stopped {job}" if stopped else f"{job} had ended already")


def _follow(jobs: Jobs, job: str) -> None:
    from raysweep.cluster.jobs import outcome, show

    try:
        ended = jobs.follow(job, show)
    except KeyboardInterrupt:
        typer.echo(f"{job} goes on: 'raysweep stop {job}' ends it", err=True)
        raise typer.Exit(130) from None
    if ended.status != "SUCCEEDED":
        raise UserError(f"{job} {ended.status.value}: {outcome(ended)}")
