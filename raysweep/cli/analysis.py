"""Commands that read results: import, fit, recommend, predict, score, split, report, ..."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from raysweep.cli import complete
from raysweep.cli.common import (
    Also,
    AsJson,
    Group,
    Literature,
    OfLoss,
    ResultsArgument,
    Where,
    Without,
    app,
    fit_results,
    listed,
    published,
    size,
    watch_report,
)
from raysweep.errors import UserError
from raysweep.text import read_number, read_size


@app.command("import")
def import_command(
    format_: Annotated[
        str,
        typer.Argument(
            help="csv, jsonl or parquet (a table, one row a run); steplaw, chinchilla, isoflop "
            "(published sweeps); wandb, mlflow, optuna, ray, losscast (other tools' runs).",
            metavar="FORMAT",
            autocompletion=complete.import_formats,
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            help="File; or ENTITY/PROJECT (wandb), URI (mlflow), STORAGE (optuna), FOLDER (ray, "
            "losscast). URI#NAME is one experiment or study.",
            metavar="SOURCE",
            autocompletion=complete.paths,
        ),
    ],
    results: Annotated[str, typer.Option("--results", help="Results folder or URI.")],
    map_: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="column=name,... ours to the source's, before what names tell; column=name*1e9 "
            "converts units, column==text is a constant, recipe.key=name keeps a hyperparameter.",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Name of the rows' study; default: the file, project or study."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Name of the data; studies of one name are fitted together."),
    ] = None,
    curves: Annotated[
        bool, typer.Option(help="Loss curves of other tools, too; wandb asks once a run.")
    ] = True,
) -> None:
    """Bring runs that exist already: tables, published sweeps, or what other tools keep."""
    from raysweep.cli.imported import said_of_import
    from raysweep.results import Results
    from raysweep.results.importers import read_source

    found = read_source(format_, source, map_, study=study, data=data, curves=curves)
    store = Results.open(results, create=True)
    new = store.write_many(found.rows, found.curves)
    out = int(found.rows["excluded"].notna().sum())
    typer.echo(f"{new} new rows of {len(found.rows)} in {store.uri}; {out} kept out of fits")
    for line in said_of_import(found, store.to_pandas(), results):
        typer.echo(line)


@app.command("export")
def export_command(
    format_: Annotated[
        str,
        typer.Argument(help="optuna.", metavar="FORMAT", autocompletion=complete.export_formats),
    ],
    results: ResultsArgument,
    file: Annotated[
        Path, typer.Argument(help="Journal to write, e.g. journal.log.", metavar="FILE")
    ],
) -> None:
    """Write results for other tools: `optuna` is a journal that optuna-dashboard opens."""
    from raysweep.results import Results
    from raysweep.search.export import export_optuna

    if format_ != "optuna":
        raise UserError(f"unknown export format {format_!r}; known: optuna")
    count = export_optuna(Results.open(results).to_pandas(), file)
    typer.echo(f"{count} trials in {file}")


@app.command("fit")
def fit_command(
    results: ResultsArgument,
    everything: Annotated[
        bool, typer.Option("--all", help="Cells, comparison, prior and checks too.")
    ] = False,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    loss: OfLoss = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Fit the optima and the laws, and print them."""
    fits = fit_results(results, group, without, literature, where, also, loss)
    typer.echo(json.dumps(fits.to_dict(), indent=1) if as_json else fits.summary(everything))
    if not (as_json or everything):
        typer.echo("\n--all shows the cells, the comparison, the prior and the checks")


@app.command("recommend")
def recommend_command(
    results: ResultsArgument,
    params: Annotated[
        float, typer.Option(help="Active non-embedding parameters: 7e9 or 7B.", parser=size)
    ],
    tokens: Annotated[float, typer.Option(help="Token budget: 1.4e12 or 1.4T.", parser=size)],
    architecture: Annotated[
        str | None, typer.Option(help="Architecture of the results; default: each of them.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts of a MoE.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token is sent to.")] = None,
    within: Annotated[
        str, typer.Option(help="Share of the best loss that the largest batch may cost.")
    ] = "0.5%",
    of: Annotated[
        str | None,
        typer.Option(
            "--of",
            help="With --group: the value to answer for, as 'fit' lists them; default: the best.",
            metavar="VALUE",
        ),
    ] = None,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    loss: OfLoss = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Recommend learning rate and batch size for a run, with the expected loss.

    Of several architectures each is answered for; then --json prints a list."""
    fits = fit_results(results, group, without, literature, where, also, loss)
    names = [architecture] if architecture is not None else fits.asked(experts, of)
    answers = [
        fits.recommend(name, params, tokens, experts=experts, top_k=top_k, group=of, within=within)
        for name in names
    ]
    if as_json:
        said = [answer.to_dict() for answer in answers]
        typer.echo(json.dumps(said if len(said) > 1 else said[0], indent=1))
    else:
        for choice in fits.choices:
            typer.echo(choice)
        typer.echo("\n\n".join(map(str, answers)))


Runs = Annotated[
    str,
    typer.Argument(
        help="Table with one row a run (CSV, JSON lines, Parquet), or a results folder.",
        metavar="FILE",
        autocompletion=complete.paths,
    ),
]
Map = Annotated[
    str | None, typer.Option("--map", help="Of FILE: column=name,... as in 'raysweep import'.")
]


@app.command("predict")
def predict_command(
    results: ResultsArgument,
    file: Runs,
    map_: Map = None,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Expected final loss of configurations: N, D, learning rate and batch a row."""
    from raysweep.results.mapping import parse_mapping
    from raysweep.scaling.plain import to_json
    from raysweep.scaling.prediction import predictions_text

    columns = parse_mapping([map_] if map_ else [])
    fits = fit_results(results, group, without, literature, where, also)
    found = fits.predict_runs(file, columns)
    if as_json:
        typer.echo(json.dumps(to_json(found.to_dict("records")), indent=1))
    else:
        typer.echo("\n".join([*fits.choices, predictions_text(found)]))


@app.command("score")
def score_command(
    results: ResultsArgument,
    file: Runs,
    map_: Map = None,
    of: Annotated[
        str | None,
        typer.Option("--of", help="Only runs of FILE for which this holds.", metavar="CONDITION"),
    ] = None,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Hold predicted losses against the known ones of runs: error, ranks, coverage, by group."""
    from raysweep.results.mapping import parse_mapping

    columns = parse_mapping([map_] if map_ else [])
    fits = fit_results(results, group, without, literature, where, also)
    found = fits.score(file, columns, where=of)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        typer.echo("\n".join([*fits.choices, str(found)]))


@app.command("split")
def split_command(
    results: ResultsArgument,
    flops: Annotated[
        str, typer.Option(help="Training budgets in FLOPs, e.g. 1e21,3e21.", metavar="C,C,...")
    ],
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Split training budgets between parameters and tokens at the least expected loss."""
    from raysweep.scaling.compute.allocation import allocations_text
    from raysweep.scaling.plain import to_json

    found = fit_results(results, None, without, literature).split(_numbers(flops, "--flops"))
    if as_json:
        told = {name: [a.to_dict() for a in rows] for name, rows in found.items()}
        typer.echo(json.dumps(to_json(told), indent=1))
    else:
        typer.echo(allocations_text(found))


@app.command("serving")
def serving_command(
    results: ResultsArgument,
    flops: Annotated[
        str | None,
        typer.Option(help="Training budgets in FLOPs, e.g. 1e21,3e21.", metavar="C,C,..."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU to serve on, e.g. h100.", autocompletion=complete.gpus)
    ] = None,
    dollars: Annotated[float | None, typer.Option(help="Price of one GPU an hour.")] = None,
    gpus: Annotated[
        str | None, typer.Option(help="Numbers of GPUs that may share one model.", metavar="G,...")
    ] = None,
    max_sequences: Annotated[
        float | None, typer.Option(help="Sequences that a server holds at once.")
    ] = None,
    prompt: Annotated[float | None, typer.Option(help="Tokens a request brings.")] = None,
    generated: Annotated[float | None, typer.Option(help="Tokens a request gets.")] = None,
    experts: Annotated[
        str | None,
        typer.Option(help="Numbers of experts to weigh; default: those trained.", metavar="E,..."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Architecture, or its experts, to match; default: the smallest mixture."),
    ] = None,
    law: Annotated[
        str | None,
        typer.Option(help="Law of the loss: wang, yun, joint_moe, sparsity; default: the best."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="CSV of measured latencies, in place of the GPU's roofline."),
    ] = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Weigh quality against the cost of serving: loss-optimal, over-trained and bounded models.

    What is not given is as the study's `serving` section says."""
    from raysweep.results import Results
    from raysweep.scaling.compute.roofline import Profile, find_gpu
    from raysweep.scaling.compute.serving import Serving, settings_of
    from raysweep.scaling.compute.serving_words import serving_dict, serving_text

    said = settings_of(Results.open(results).search_spaces())
    given = {
        "gpu": gpu and find_gpu(gpu).name,
        "dollars": dollars,
        "gpus": gpus and tuple(int(g) for g in _numbers(gpus, "--gpus")),
        "max_sequences": max_sequences,
        "prompt": prompt,
        "generated": generated,
    }
    said = said.model_copy(update={k: v for k, v in given.items() if v is not None})
    budgets = _numbers(flops, "--flops") if flops else said.budgets
    if not budgets:
        raise UserError("no training budget: give --flops, or serving.budgets in the study's file")
    serving = Serving.of(said, Profile.read(profile) if profile else None)
    counts = _numbers(experts, "--experts") if experts else ()
    fits = fit_results(results, None, without, literature)
    found = fits.serving_law(serving, counts, reference or said.reference, law)
    show = serving_dict if as_json else serving_text
    told = show(found.solutions(budgets), found)
    typer.echo(json.dumps(told, indent=1) if as_json else told)


@app.command("report")
def report_command(
    results: ResultsArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write to; default: reports/STUDY."),
    ] = None,
    asked: Annotated[
        list[str] | None,
        typer.Option("--for", help="Run to answer for first. Repeatable.", metavar="PARAMS@TOKENS"),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Write each figure as PNG as well.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Build it again as trials land, until the run ends.")
    ] = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    loss: OfLoss = None,
    without: Without = None,
    literature: Literature = None,
) -> None:
    """Write the HTML report of a results folder; with --watch, keep it live."""
    from raysweep.report.write import check_folder, write_report

    if output is not None:
        check_folder(output)
    if watch:
        if group or where or also or loss or without or literature or asked:
            raise UserError("--watch fits as the study says: leave out --group, --for and the like")
        from raysweep.report.page import folder_of
        from raysweep.results import Results

        folder = output or folder_of(Results.open(results))
        watch_report(results, folder, png=png, until_eof=until_eof)
        return
    runs = [_run_asked(text) for text in asked or ()]
    fits = fit_results(results, group, without, literature, where, also, loss)
    page = write_report(results, output, fits=fits, png=png, asked=runs)
    typer.echo(page.resolve().as_uri() if sys.stdout.isatty() else str(page))


def _run_asked(text: str) -> tuple[str, str]:
    """N and D of `7B@1.4T`."""
    params, at, tokens = text.partition("@")
    if not at:
        raise UserError(f"--for {text}: write it as PARAMS@TOKENS, as in 7B@1.4T")
    read_size(params, "params")
    read_size(tokens, "tokens")
    return params, tokens


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [read_number(part) for part in text.split(",")]
    except UserError:
        raise UserError(f"{option} {text}: give numbers with commas between, as in 2,4,8") from None


@app.command("compare")
def compare_command(
    results: Annotated[
        list[str],
        typer.Argument(
            help="Results folders or URIs; RESULTS#STUDY is one study of one.",
            metavar="RESULTS...",
            autocompletion=complete.results,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write a page to.")
    ] = None,
    architecture: Annotated[
        list[str] | None, typer.Option(help="Compare this architecture only. Repeatable.")
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Size at which the sides stand side by side.", parser=size),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="Its token budget; default: the largest shared.", parser=size),
    ] = None,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    loss: OfLoss = None,
    without: Without = None,
    literature: Literature = None,
    png: Annotated[bool, typer.Option("--png", help="Write each figure as PNG as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare architectures, groups, studies or folders: optima, losses, FLOPs for equal loss."""
    from raysweep.scaling.sides import compare

    found = compare(
        *results,
        architectures=listed(architecture),
        group=listed(group),
        params=params,
        tokens=tokens,
        where=where,
        also=listed(also),
        loss=loss,
        **published(without, literature),
    )
    if output is not None:
        from raysweep.report.write import check_folder

        check_folder(output)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if output is not None:
        from raysweep.report.compare import write_comparison
        from raysweep.report.render import relative

        words = ["raysweep", "compare", *map(relative, results), "-o", relative(str(output))]
        for option, values in {
            "--architecture": architecture,
            "--group": group,
            "--where": [where] if where else None,
            "--also": also,
            "--loss": [loss] if loss else None,
            "--without": without,
            "--literature": literature,
        }.items():
            words += [word for value in values or () for word in (option, value)]
        page = write_comparison(
            found.arms, output, png=png, apart=found.apart, command=shlex.join(words)
        )
        typer.echo(str(page), err=as_json)
