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
            help="A table with one row a run: csv, jsonl, parquet. A published sweep: steplaw, "
            "chinchilla, isoflop. Runs of another tool: wandb, mlflow, optuna, ray, losscast.",
            metavar="FORMAT",
            autocompletion=complete.import_formats,
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            help="A file; or ENTITY/PROJECT (wandb), URI (mlflow), STORAGE (optuna), FOLDER (ray, "
            "losscast). URI#NAME picks one experiment or study.",
            metavar="SOURCE",
            autocompletion=complete.paths,
        ),
    ],
    results: Annotated[str, typer.Option("--results", help="Results folder or URI to write to.")],
    map_: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="Which column is which: OURS=THEIRS,... With units: tokens=D*1e9, "
            "loss=log(PERPLEXITY). The same for all rows: architecture==dense. A hyperparameter "
            "to keep: recipe.KEY=THEIRS.",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Name of these runs as a study. Default: that of the file or project."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Name of the training data. Studies on the same data are fitted together."
        ),
    ] = None,
    curves: Annotated[
        bool, typer.Option(help="Import loss curves too. For wandb that is one request a run.")
    ] = True,
) -> None:
    """Import runs you already have: a table, a published sweep, or runs of another tool."""
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
        typer.Argument(
            help="Always optuna.", metavar="FORMAT", autocompletion=complete.export_formats
        ),
    ],
    results: ResultsArgument,
    file: Annotated[
        Path, typer.Argument(help="Journal file to write: journal.log.", metavar="FILE")
    ],
) -> None:
    """Write the trials as an Optuna journal, which optuna-dashboard opens."""
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
        bool, typer.Option("--all", help="Print cells, comparison, prior and checks too.")
    ] = False,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    loss: OfLoss = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Fit how the best settings and the loss scale, and print the laws."""
    fits = fit_results(results, group, without, literature, where, also, loss)
    typer.echo(json.dumps(fits.to_dict(), indent=1) if as_json else fits.summary(everything))
    if not (as_json or everything):
        typer.echo("\nadd --all for the cells, the comparison, the prior and the checks")


@app.command("recommend")
def recommend_command(
    results: ResultsArgument,
    params: Annotated[
        float, typer.Option(help="Active parameters without embeddings: 7e9 or 7B.", parser=size)
    ],
    tokens: Annotated[float, typer.Option(help="Training tokens: 1.4e12 or 1.4T.", parser=size)],
    architecture: Annotated[
        str | None, typer.Option(help="Architecture to answer for. Default: all in the results.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Number of routed experts, for a MoE.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that each token is sent to.")] = None,
    within: Annotated[
        str, typer.Option(help="How much more loss the largest batch may cost.")
    ] = "0.5%",
    of: Annotated[
        str | None,
        typer.Option(
            "--of",
            help="With --group: the value to answer for, as 'fit' lists it. Default: the best.",
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
    """Recommend learning rate and batch size for a run, and predict its loss.

    With several architectures it answers for each; --json then prints a list."""
    fits = fit_results(results, group, without, literature, where, also, loss)
    names = [architecture] if architecture is not None else fits.asked(experts, top_k, of)
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
        help="Table with one row a run (CSV, JSON lines or Parquet), or a results folder.",
        metavar="FILE",
        autocompletion=complete.paths,
    ),
]
Map = Annotated[
    str | None,
    typer.Option("--map", help="Which column of FILE is which, as in 'raysweep import'."),
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
    """Predict the final loss of runs: each row gives N, D, learning rate and batch."""
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
        typer.Option(
            "--of", help="Use only the runs of FILE for which this holds.", metavar="CONDITION"
        ),
    ] = None,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Compare predicted losses with known ones: error, ranks, coverage, by group."""
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
    """Split a training budget between parameters and tokens for the lowest expected loss."""
    from raysweep.scaling.compute.allocation import allocations_text
    from raysweep.scaling.plain import to_json

    found = fit_results(results, None, without, literature).split(_numbers(flops, "--flops"))
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=1))
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
        str | None,
        typer.Option(help="GPU that serves the model, such as h100.", autocompletion=complete.gpus),
    ] = None,
    dollars: Annotated[
        float | None, typer.Option(help="Price of one GPU for an hour, in dollars.")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="How many GPUs may share one model, such as 1,2,4.", metavar="G,..."),
    ] = None,
    max_sequences: Annotated[
        float | None, typer.Option(help="Most sequences that a server holds at once.")
    ] = None,
    prompt: Annotated[float | None, typer.Option(help="Tokens in the prompt of a request.")] = None,
    generated: Annotated[float | None, typer.Option(help="Tokens generated for a request.")] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help="Numbers of experts to consider. Default: those trained.", metavar="E,..."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Whose loss to match: an architecture or number of experts. Default: the smallest."
        ),
    ] = None,
    law: Annotated[
        str | None,
        typer.Option(help="Law of the loss: wang, yun, joint_moe or sparsity. Default: the best."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="CSV of measured latencies. Default: those expected from the GPU's data sheet."
        ),
    ] = None,
    without: Without = None,
    literature: Literature = None,
    as_json: AsJson = False,
) -> None:
    """Weigh a model's loss against what it costs to serve.

    Settings that are not given here come from the study's `serving` section."""
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
        typer.Option("-o", "--output", help="Folder to write to. Default: reports/STUDY."),
    ] = None,
    asked: Annotated[
        list[str] | None,
        typer.Option(
            "--for", help="A run to answer for first: 7B@1.4T. Repeatable.", metavar="PARAMS@TOKENS"
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Write each figure as PNG as well.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Rebuild it as trials finish, until the run ends.")
    ] = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
    group: Group = None,
    where: Where = None,
    also: Also = None,
    loss: OfLoss = None,
    without: Without = None,
    literature: Literature = None,
) -> None:
    """Write the HTML report of a results folder."""
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
            help="Results folders or URIs. RESULTS#STUDY picks one study of a folder.",
            metavar="RESULTS...",
            autocompletion=complete.results,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write an HTML page to.")
    ] = None,
    architecture: Annotated[
        list[str] | None, typer.Option(help="Compare only this architecture. Repeatable.")
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(
            help="Model size to compare at. Default: the largest that all share.", parser=size
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            help="Training tokens to compare at. Default: the most that all share.", parser=size
        ),
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
    """Compare architectures, groups, studies or folders: best settings, loss, FLOPs."""
    from raysweep.scaling.sides import compare

    if output is not None:
        from raysweep.report.write import check_folder

        check_folder(output)
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
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if output is not None:
        from raysweep.report.compare import write_comparison
        from raysweep.report.render import relative

        words = ["raysweep", "compare", *map(relative, results), "-o", relative(str(output))]
        for option, values in {
            "--architecture": architecture,
            "--params": [f"{params:.12g}"] if params else None,
            "--tokens": [f"{tokens:.12g}"] if tokens else None,
            "--group": group,
            "--where": [where] if where else None,
            "--also": also,
            "--loss": [loss] if loss else None,
            "--without": without,
            "--literature": literature,
        }.items():
            words += [word for value in values or () for word in (option, value)]
        words += ["--png"] if png else []
        page = write_comparison(found, output, png=png, command=shlex.join(words))
        typer.echo(str(page), err=as_json)
