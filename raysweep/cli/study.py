"""Commands that make results: run, plan, train, schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from raysweep.cli import complete
from raysweep.cli.common import (
    AsJson,
    ResultsOption,
    Set,
    Space,
    app,
    live_report,
    load_study,
)
from raysweep.errors import UserError


@app.command("run")
def run_command(
    space: Space,
    results: ResultsOption = None,
    set_: Set = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join. Default: start Ray on this machine.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: reports/STUDY.")
    ] = None,
    live: Annotated[
        bool | None,
        typer.Option(
            "--live/--no-live",
            help="Keep the report up to date during the run. Default: yes, except in CI.",
        ),
    ] = None,
) -> None:
    """Run a study: search every cell, fit the laws, write the report. Run it again to continue."""
    from raysweep.report.write import check_folder, opening_answers, write_report
    from raysweep.results import Results
    from raysweep.scaling.fits import fit
    from raysweep.search.interruption import Interrupted
    from raysweep.search.run import run

    study = load_study(space, set_)
    folder = report or Path("reports") / study.name
    check_folder(folder)
    uri = results or str(Path("results") / study.name)
    try:
        with ExitStack() as stack:
            settled: list[Callable[[], None]] = []

            def started() -> None:  # not before: another driver may hold the study
                settled.append(stack.enter_context(live_report(uri, folder, live)))

            summary = run(study, results_uri=uri, address=address, started=started)
            for settle in settled:
                settle()
            for problem in summary.results.problems:
                typer.echo(f"warning: {problem}", err=True)
            typer.echo("fitting the laws and writing the report", err=True)
            opened = Results.open(summary.results.uri)
            fits = fit(opened)
            page = write_report(opened, folder, fits=fits)
    except Interrupted as interrupted:
        typer.echo(f"interrupted: {interrupted}", err=True)
        raise typer.Exit(interrupted.exit_code) from None
    if answers := opening_answers(opened, fits):
        typer.echo("\n" + "\n\n".join(answers) + "\n")
    typer.echo(page.resolve().as_uri())


@app.command("plan")
def plan_command(
    space: Space,
    set_: Set = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Time a few training steps to estimate how long the study takes here. Not for "
            "your own training code."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Show what a study would run: cells, parameters, tokens, FLOPs and time."""
    from raysweep.study.plan import make_plan, render_plan, with_times

    study = load_study(space, set_)
    plan = make_plan(study)
    if calibrate and study.space.training is None:
        from raysweep.training.calibrate import calibrate as measured

        try:
            plan = with_times(plan, study, measured(study))
        except UserError as error:
            typer.echo(f"note: {error} (--no-calibrate leaves this out)", err=True)
    if as_json:
        typer.echo(json.dumps(plan.to_dict(), indent=1))
        return
    render_plan(plan)
    if study.space.training is not None:
        return
    try:
        from raysweep.data.corpus import expected_repeats

        longest = max(cell.tokens for cell in study.cells)
        warning = expected_repeats(study.space.data, study.folder, longest)
    except UserError as error:
        typer.echo(f"note: {error}", err=True)
        return
    if warning:
        typer.echo(f"warning: {warning}", err=True)


@app.command("train")
def train_command(
    space: Space,
    cell: Annotated[
        str,
        typer.Option(help="Name of the cell, as 'plan' lists it.", autocompletion=complete.cells),
    ],
    lr: Annotated[float, typer.Option(help="Peak learning rate.")],
    batch_tokens: Annotated[int, typer.Option(help="Global batch in tokens.")],
    seed: Annotated[int | None, typer.Option(help="Seed. Default: the study's.")] = None,
    results: Annotated[
        str | None, typer.Option(help="Results folder or URI to keep its row in.", metavar="URI")
    ] = None,
    set_: Set = None,
) -> None:
    """Train one trial here, without Ray, also with your own code."""
    from raysweep.training.single import train_one

    row = train_one(load_study(space, set_), cell, lr, batch_tokens, seed=seed, results_uri=results)
    shown = ("status", "reason", "loss", "loss_se", "bits_per_byte", "tokens_seen", "seconds_train")
    typer.echo(json.dumps({"trial_key": row["trial_key"], **{k: row[k] for k in shown}}, indent=1))


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of search-space files, for editors."""
    from raysweep.study.schema import SearchSpace

    typer.echo(json.dumps(SearchSpace.model_json_schema(), indent=1))
