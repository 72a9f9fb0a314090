"""Does a forecast come true? A ladder's largest scale, forecast before it is trained.

    python -m benchmarks.forecast FOLDER [--space FILE] [--set KEY=VALUE]...
    python -m benchmarks.forecast FOLDER --rows     # trains nothing: outcome and page of rows

FOLDER holds the search space (by default its only .yaml) and gets everything else; run again, it
goes on where it stopped:

1. every scale but the last of the file is searched (`FOLDER/results`);
2. `results/forecast.json`: of each cell of the last scale learning rate, batch and loss with
   intervals, read off the others. It is written once, and never after a trial of that scale;
3. the last scale is searched, `TRIALS` a cell at least;
4. the forecast's settings are trained `SEEDS` times a cell (`FOLDER/check`);
5. `results/outcome.json`, the report page with both side by side, and `outcome.md` with the same
   table and the claims of Wang et al.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from raysweep.errors import UserError
from raysweep.report.forecast import forecast_rows, forecast_words
from raysweep.results import Results
from raysweep.scaling.claims import claims_text
from raysweep.scaling.fits import Fits, fit
from raysweep.scaling.forecast import forecast, outcome
from raysweep.study import Study

TRIALS, SEEDS = 12, 2


def outcome_text(told: Mapping[str, Any], found: Mapping[str, Any], fits: Fits) -> str:
    """Forecast and outcome side by side, and the claims, as Markdown."""
    heads = ("cell", "", "forecast, 95 %", "found, 95 %", "best trial", "found inside?", "off")
    lines = [f"# The forecast of scale {told['scale']}", "", forecast_words(told, found), ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row.values())} |" for row in forecast_rows(told, found)]
    claims = ["", "```", *claims_text(fits.claims)[1:], "```"] if fits.claims else []
    return "\n".join([*lines, *claims]) + "\n"


def run_ladder(folder: Path, space: Path, overrides: Sequence[str]) -> Path:
    """All five steps; returns the page."""
    from raysweep.search.run import run
    from raysweep.training.single import train_one

    whole = Study.load(space, overrides)
    last = len(whole.space.scales) - 1
    entries = [s.model_dump(exclude_none=True, mode="json") for s in whole.space.scales]
    scales = list(dict.fromkeys(c.scale for c in whole.cells))
    smaller = _with(space, overrides, {"scales": entries[:last]})
    largest = next(s for s in scales if s not in {c.scale for c in smaller.cells})
    results = Results.open(folder / "results", create=True)
    if not results.forecast()[0]:
        run(smaller, results_uri=results.uri)
        if (results.to_pandas()["scale"] == largest).any():
            raise UserError(
                f"{results.uri} holds trials of {largest} already: no forecast can be made"
            )
        told = forecast(fit(results), whole, largest)
        told["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        results.save_forecast(told)
    told, _ = results.forecast()
    trials = max(TRIALS, whole.space.search.trials_per_cell)
    change = {"scales": entries[last:], "search.trials_per_cell": trials}
    run(_with(space, overrides, change), results_uri=results.uri)
    check = Results.open(folder / "check", create=True)
    for name, row in told["cells"].items():
        done = check.to_pandas()
        for seed in range(int((done["cell"] == name).sum()), SEEDS):
            batch = row["batch_sequences"] * whole.cell(name).shape.sequence_length
            rate = row["learning_rate"]["value"]
            train_one(whole, name, rate, batch, seed=100 + seed, results_uri=check.uri)
    results.save_search_space(whole.name, space.read_text(encoding="utf-8"))
    return conclude(folder)


def conclude(folder: Path) -> Path:
    """The last step, of the rows that are there; returns the page."""
    from raysweep.report import report

    results, check = Results.open(folder / "results"), Results.open(folder / "check")
    told, _ = results.forecast()
    if not told:
        raise UserError(f"{results.uri} holds no forecast: run without --rows")
    fits = fit(results)
    found = outcome(told, fits, results.to_pandas(), check.to_pandas())
    results.save_forecast(told, found)
    (folder / "outcome.md").write_text(outcome_text(told, found, fits), encoding="utf-8")
    return report(results, folder, fits=fits)


def _with(space: Path, overrides: Sequence[str], change: Mapping[str, object]) -> Study:
    given = (text.partition("=")[::2] for text in overrides)
    return Study.load(space, {**{key: yaml.safe_load(value) for key, value in given}, **change})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--space", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", action="store_true", help="train nothing: what the rows tell")
    given = parser.parse_args(arguments)
    if given.rows:
        print(conclude(given.folder))
        return
    space = given.space or next(iter(sorted(given.folder.glob("*.yaml"))), None)
    if space is None:
        raise UserError(f"{given.folder} holds no search space: name it with --space")
    print(run_ladder(given.folder, space, given.set))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
