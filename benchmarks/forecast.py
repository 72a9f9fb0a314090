"""Does a forecast come true? A ladder's largest scale, forecast before it is trained.

    python -m benchmarks.forecast FOLDER [--space FILE] [--set KEY=VALUE]...

FOLDER holds the search space (by default its only .yaml) and gets everything else; run again, it
goes on where it stopped:

1. every scale but the last of the file is searched (`FOLDER/results`);
2. `forecast.json`: of each cell of the last scale learning rate, batch and loss with intervals,
   read off the others. It is written once, and never after a trial of that scale;
3. the last scale is searched, `TRIALS` a cell at least;
4. the forecast's settings are trained `SEEDS` times a cell (`FOLDER/check`);
5. `outcome.json`, `outcome.md` and the report page: optimum inside the interval or not, regret of
   the forecast's settings in % with its noise, error of the loss; and the claims of Wang et al.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.schema import FINISHED
from raysweep.scaling.claims import claims_text
from raysweep.scaling.fits import Fits, fit
from raysweep.scaling.plain import to_json
from raysweep.study import Study

TRIALS, SEEDS = 12, 2
QUANTITIES = ("learning_rate", "batch_tokens", "loss")


def forecast(fits: Fits, study: Study, scale: str) -> dict[str, Any]:
    """What the fits say of each cell of a scale."""
    cells = {}
    for cell in (c for c in study.cells if c.scale == scale):
        n = cell.counts.params_active_non_embedding
        told = fits.recommend(cell.architecture, float(n), float(cell.tokens))
        row: dict[str, Any] = {"architecture": cell.architecture, "verdict": told.verdict}
        for name in QUANTITIES:
            low, high = getattr(told, f"{name}_interval")
            row[name] = {"value": getattr(told, name), "low": low, "high": high}
        length = cell.shape.sequence_length
        exact = told.batch_tokens_exact / length
        row["batch_sequences"] = max(1, 2 ** round(math.log2(exact)))
        cells[cell.name] = row
    return {"scale": scale, "rows": fits.n_rows, "cells": cells}


def outcome(
    told: Mapping[str, Any], fits: Fits, trials: pd.DataFrame, check: pd.DataFrame
) -> dict[str, Any]:
    """Forecast and outcome of each cell. `check` are the runs of the forecast's settings.

    `regret` is their mean loss over the least loss of the cell's trials, less 1; `regret_sd` the
    standard error by the spread between seeds (that of one run for the least loss too)."""
    found = {}
    for name, row in told["cells"].items():
        own = trials[(trials["cell"] == name) & (trials["status"] == FINISHED)]
        again = check[(check["cell"] == name) & (check["status"] == FINISHED)]
        if not len(own) or name not in fits.cells.index:
            found[name] = {"trials": len(own)}
            continue
        cell = fits.cells.loc[name]
        best = float(own["loss"].min())
        loss = again["loss"].to_numpy(float)
        spread = float(np.std(loss, ddof=1)) if len(loss) > 1 else math.nan
        inside = {q: bool(row[q]["low"] <= float(cell[q]) <= row[q]["high"]) for q in QUANTITIES}
        found[name] = {
            "trials": len(own),
            **{q: float(cell[q]) for q in QUANTITIES},
            "optimum": str(cell["status"]),
            "best_loss": best,
            "inside": inside,
            "loss_error": row["loss"]["value"] / float(cell["loss"]) - 1,
            "checked": len(loss),
            "regret": float(loss.mean()) / best - 1 if len(loss) else math.nan,
            "regret_sd": spread * math.sqrt(1 + 1 / len(loss)) / best if len(loss) else math.nan,
        }
    return {"scale": told["scale"], "cells": found}


def outcome_text(told: Mapping[str, Any], found: Mapping[str, Any], fits: Fits) -> str:
    """Forecast and outcome side by side, as Markdown."""
    lines = [
        f"# The forecast of scale {told['scale']}",
        "",
        f"Forecast {told['written']} from {told['rows']} rows of the smaller scales, before any "
        "trial of this one. In brackets 95 % intervals; bold where the outcome lies outside.",
        "",
        "| cell | learning rate | found | batch, tokens | found | loss | found | loss error "
        "| regret of the forecast's settings | trials |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in told["cells"].items():
        own = found["cells"][name]
        cells = [name]
        if "inside" not in own:
            lines.append(f"| {name} | not trained |" + " |" * 8)
            continue
        for quantity, style in zip(QUANTITIES, (".2g", ".3g", ".4f"), strict=True):
            e = row[quantity]
            known, said = math.isfinite(e["value"]), f"{own[quantity]:{style}}"
            ends = f"({e['low']:{style}} to {e['high']:{style}})"
            cells.append(f"{e['value']:{style}} {ends}" if known else "not determined")
            cells.append(said if own["inside"][quantity] or not known else f"**{said}**")
        noise = f"± {1.96 * own['regret_sd']:.2%}" if math.isfinite(own["regret_sd"]) else ""
        error = f"{own['loss_error']:+.2%}" if math.isfinite(own["loss_error"]) else "–"
        cells += [error, f"{own['regret']:.2%} {noise}", str(own["trials"])]
        lines.append(f"| {' | '.join(cells)} |")
    claims = ["```", *claims_text(fits.claims)[1:], "```"] if fits.claims else []
    return "\n".join([*lines, "", *claims]) + "\n"


def run_ladder(folder: Path, space: Path, overrides: Sequence[str]) -> Path:
    """All five steps; returns the page."""
    from raysweep.report import report
    from raysweep.search.run import run
    from raysweep.training.single import train_one

    whole = Study.load(space, overrides)
    last = len(whole.space.scales) - 1
    entries = [s.model_dump(exclude_none=True, mode="json") for s in whole.space.scales]
    scales = list(dict.fromkeys(c.scale for c in whole.cells))
    smaller = _with(space, overrides, {"scales": entries[:last]})
    largest = next(s for s in scales if s not in {c.scale for c in smaller.cells})
    uri, written = str(folder / "results"), folder / "forecast.json"
    if not written.exists():
        run(smaller, results_uri=uri)
        rows = Results.open(uri).to_pandas()
        if (rows["scale"] == largest).any():
            raise UserError(f"{uri} holds trials of {largest} already: no forecast can be made")
        told = forecast(fit(Results.open(uri)), whole, largest)
        told["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        written.write_text(json.dumps(to_json(told), indent=1) + "\n", encoding="utf-8")
    told = json.loads(written.read_text(encoding="utf-8"), object_hook=_with_nan)
    trials = max(TRIALS, whole.space.search.trials_per_cell)
    change = {"scales": entries[last:], "search.trials_per_cell": trials}
    run(_with(space, overrides, change), results_uri=uri)
    check = Results.open(folder / "check", create=True)
    for name, row in told["cells"].items():
        done = check.to_pandas()
        for seed in range(int((done["cell"] == name).sum()), SEEDS):
            batch = row["batch_sequences"] * whole.cell(name).shape.sequence_length
            rate = row["learning_rate"]["value"]
            train_one(whole, name, rate, batch, seed=100 + seed, results_uri=check.uri)
    results = Results.open(uri)
    results.save_search_space(whole.name, space.read_text(encoding="utf-8"))
    fits = fit(results)
    found = outcome(told, fits, results.to_pandas(), check.to_pandas())
    (folder / "outcome.json").write_text(json.dumps(to_json(found), indent=1) + "\n")
    (folder / "outcome.md").write_text(outcome_text(told, found, fits), encoding="utf-8")
    return report(results, folder, fits=fits)


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not determined stands as null."""
    return {key: math.nan if value is None else value for key, value in record.items()}


def _with(space: Path, overrides: Sequence[str], change: Mapping[str, object]) -> Study:
    given = (text.partition("=")[::2] for text in overrides)
    return Study.load(space, {**{key: yaml.safe_load(value) for key, value in given}, **change})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--space", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    space = given.space or next(iter(sorted(given.folder.glob("*.yaml"))), None)
    if space is None:
        raise UserError(f"{given.folder} holds no search space: name it with --space")
    print(run_ladder(given.folder, space, given.set))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
