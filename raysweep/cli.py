"""The command line: a thin skin over the Python API, and the only place that composes the parts."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raysweep.errors import UserError

if TYPE_CHECKING:
    from raysweep.cluster.jobs import Jobs
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
DEFAULT_JOBS = "http://127.0.0.1:8265"
JobsAddress = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="Jobs address of the head.",
        metavar="http://HEAD:8265",
    ),
]
JobArgument = Annotated[str, typer.Argument(help="Job, as 'raysweep status' lists it.")]
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


@app.command("run")
def run_command(
    space: Space,
    results: ResultsOption = None,
    set_: Set = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; default: start Ray on this machine.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder of the report; default: reports/STUDY.")
    ] = None,
) -> None:
    """Search every cell of a study, fit the laws, write the report. Run again to continue."""
    from raysweep.search.run import run

    study = _load(space, set_)
    summary = run(study, results_uri=results, address=address)
    for problem in summary.results.problems:
        typer.echo(f"warning: {problem}", err=True)
    typer.echo("fitting the laws and writing the report", err=True)
    page = _write_report(summary.results.uri, report or Path("reports") / study.name)
    typer.echo(str(page))


@app.command("plan")
def plan_command(space: Space, set_: Set = None, as_json: AsJson = False) -> None:
    """Show a study's cells, parameters, tokens and FLOPs. Trains nothing."""
    from raysweep.plan import make_plan, render_plan

    plan = make_plan(_load(space, set_))
    if as_json:
        typer.echo(json.dumps(plan.to_dict(), indent=1))
    else:
        render_plan(plan)


@app.command("train")
def train_command(
    space: Space,
    cell: Annotated[str, typer.Option(help="Name of the cell; 'plan' lists them.")],
    lr: Annotated[float, typer.Option(help="Peak learning rate.")],
    batch_tokens: Annotated[int, typer.Option(help="Global batch in tokens.")],
    seed: Annotated[int | None, typer.Option(help="Seed; default: the study's.")] = None,
    results: ResultsOption = None,
    set_: Set = None,
) -> None:
    """Train one trial here, without Tune. With --results its row is kept."""
    from raysweep.training.single import train_one

    row = train_one(_load(space, set_), cell, lr, batch_tokens, seed=seed, results_uri=results)
    shown = ("status", "reason", "loss", "loss_se", "bits_per_byte", "tokens_seen", "seconds_train")
    typer.echo(json.dumps({"trial_key": row["trial_key"], **{k: row[k] for k in shown}}, indent=1))


@app.command("import")
def import_command(
    format_: Annotated[
        str, typer.Argument(help="steplaw, chinchilla, isoflop or csv.", metavar="FORMAT")
    ],
    file: Annotated[Path, typer.Argument(help="File to read.")],
    results: Annotated[str, typer.Option("--results", help="Results folder or URI.")],
    map_: Annotated[
        str | None, typer.Option("--map", help="For csv: column=name,... ours to the file's.")
    ] = None,
) -> None:
    """Bring results that exist already: published sweeps, or your own as CSV."""
    from raysweep.results import Results
    from raysweep.results.importers import import_file

    rows = import_file(format_, file, map_)
    store = Results.open(results, create=True)
    new = store.write_many(rows)
    left_out = rows[rows["excluded"].notna()]
    typer.echo(f"{new} new rows of {len(rows)} in {store.uri}; {len(left_out)} kept out of fits")
    for reason, count in left_out["excluded"].value_counts().items():
        typer.echo(f"  {count} x {reason}")


@app.command("export")
def export_command(
    format_: Annotated[str, typer.Argument(help="optuna.", metavar="FORMAT")],
    results: ResultsArgument,
    file: Annotated[Path, typer.Argument(help="Journal to write, e.g. journal.log.")],
) -> None:
    """Write results for other tools: `optuna` is a journal that optuna-dashboard opens."""
    from raysweep.results import Results
    from raysweep.search.export import export_optuna

    if format_ != "optuna":
        raise UserError(f"unknown export format {format_!r}; known: optuna")
    count = export_optuna(Results.open(results).frame(), file)
    typer.echo(f"{count} trials in {file}")


@app.command("fit")
def fit_command(results: ResultsArgument, as_json: AsJson = False) -> None:
    """Fit the optima and the laws, and print them."""
    fits = _fit(results)
    typer.echo(json.dumps(fits.to_dict(), indent=1) if as_json else str(fits))


@app.command("recommend")
def recommend_command(
    results: ResultsArgument,
    params: Annotated[float, typer.Option(help="Active non-embedding parameters, e.g. 7e9.")],
    tokens: Annotated[float, typer.Option(help="Token budget, e.g. 1.4e12.")],
    architecture: Annotated[
        str | None, typer.Option(help="Architecture of the study; default: the one that fits.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts of a MoE.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token is sent to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Recommend learning rate and batch size for a run, with the expected loss."""
    answer = _fit(results).recommend(
        architecture, params=params, tokens=tokens, experts=experts, top_k=top_k
    )
    typer.echo(json.dumps(answer.to_dict(), indent=1) if as_json else str(answer))


@app.command("report")
def report_command(
    results: ResultsArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")],
    png: Annotated[bool, typer.Option("--png", help="Write each figure as PNG as well.")] = False,
) -> None:
    """Write the HTML report of a results folder."""
    typer.echo(str(_write_report(results, output, png=png)))


@app.command("submit")
def submit_command(
    space: Space,
    results: Annotated[
        str, typer.Option("--results", help="Results URI that all nodes reach.", metavar="URI")
    ],
    address: JobsAddress = DEFAULT_JOBS,
    set_: Set = None,
    env_file: Annotated[
        Path | None, typer.Option(help="KEY=VALUE lines for the study's environment.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the study to its end.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="A local results folder is shared by all nodes.")
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
        typer.Argument(help="A job, or a results folder or URI.", metavar="[JOB|RESULTS]"),
    ] = None,
    address: JobsAddress = DEFAULT_JOBS,
    as_json: AsJson = False,
) -> None:
    """Show a cluster's studies, one of them, or how far the cells of a results URI are."""
    from raysweep.cluster import jobs, progress

    if what is not None and not what.startswith(("raysweep-", "raysubmit_")):
        cells = progress.progress(what)
        shown = [cell.to_dict() for cell in cells]
        typer.echo(json.dumps(shown, indent=1) if as_json else progress.render(cells))
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
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the study ends.")] = False,
) -> None:
    """Show what a submitted study prints."""
    from raysweep.cluster.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    else:
        typer.echo(jobs.logs(job), nl=False)


@app.command("stop")
def stop_command(job: JobArgument, address: JobsAddress = DEFAULT_JOBS) -> None:
    """End a submitted study. Its rows stay; submit it again to continue."""
    from raysweep.cluster.jobs import Jobs

    stopped = Jobs(address).stop(job)
    typer.echo(f"stopped {job}" if stopped else f"{job} had ended already")


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of search-space files, for editors."""
    from raysweep.config.schema import SearchSpace

    typer.echo(json.dumps(SearchSpace.model_json_schema(), indent=1))


def _follow(jobs: Jobs, job: str) -> None:
    from raysweep.cluster.jobs import show

    try:
        ended = jobs.follow(job, show)
    except KeyboardInterrupt:
        typer.echo(f"{job} goes on: 'raysweep stop {job}' ends it", err=True)
        raise typer.Exit(130) from None
    if ended.status != "SUCCEEDED":
        raise UserError(
            f"{job} {ended.status.value}: {' '.join((ended.message or '').split())[:300]}"
        )


def _load(space: Path, overrides: list[str] | None) -> Study:
    from raysweep.config import Study

    return Study.load(space, overrides or ())


def _fit(uri: str) -> Any:
    from raysweep.results import Results
    from raysweep.scaling.fits import fit

    results = Results.open(uri)
    fits = fit(results.frame())
    for problem in results.problems:
        typer.echo(f"warning: {problem}", err=True)
    return fits


def _write_report(uri: str, folder: Path, *, png: bool = False) -> Path:
    from raysweep.report import report
    from raysweep.results import Results

    return report(Results.open(uri), folder, png=png)


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


if __name__ == "__main__":
    main()
