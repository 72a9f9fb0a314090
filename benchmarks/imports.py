"""Somebody else's log, planted: what import says of it, and how far the answers are off.

`python -m benchmarks.imports log [--draws D]` plants logs as public ones are (five sizes, tokens
that differ by a thousandth within a cell, four optimizers with optima of their own, a weight decay
of effect, three columns of no use, one run in twenty cut short, one in fifty in wrong units), and
reports whether import names all of it, the true regret of the recommendation for the largest size
by a fit of the smaller ones, whether its interval holds the true loss, and the score on the runs of
the largest size.

`python -m benchmarks.imports table` prints a small one, that of `reports/examples/imported`.

`python -m benchmarks.imports size` times import, fit and report on 2,000 rows of eleven groups.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.entry import make_parser, save, start
from benchmarks.planted import SHAPES, Valley, plant_valley
from raysweep.cli.imported import said_of_import
from raysweep.report.write import write_report
from raysweep.results.importers import read_source
from raysweep.results.store import Results
from raysweep.scaling.fit import fit

SEQUENCE = 2048
CUT_SHORT, WRONG_UNITS = 0.05, 0.02
NOISE = 0.001
"""sd of ln loss of one run at its optimum."""
DECAY = 0.004
"""What ln loss rises by where the weight decay is e times its best, .1."""
USELESS = ("gpu", "node", "comment")


@dataclass(frozen=True)
class PlantedLog:
    """A log as a tracker exports it, and its truth. Points are (ln learning rate, ln batch)."""

    table: pd.DataFrame
    sizes: np.ndarray
    ratios: np.ndarray
    """Tokens a parameter of the horizons."""
    groups: tuple[str, ...]
    moves: np.ndarray
    """[groups, 3]: what each adds to ln learning rate, ln batch and ln loss."""
    centre: np.ndarray
    slopes: np.ndarray
    """[2, 2]: of ln learning rate and ln batch in ln N and ln D."""
    valley: Valley
    cut: int
    wrong: int

    def optimum(self, group: str, params: float, tokens: float) -> np.ndarray:
        """The optimum of one run."""
        move = self.moves[self.groups.index(group)]
        off = np.log([params / self.sizes[0], tokens / (self.sizes[0] * self.ratios[0])])
        return self.centre + self.slopes @ off + move[:2]

    def lowest(self, group: str, params: float, tokens: float) -> float:
        """The loss there, at the best weight decay."""
        law = 1.75 + 430 / params**0.34 + 1800 / tokens**0.36
        return law * float(np.exp(self.moves[self.groups.index(group), 2]))

    def gap(self, group: str, params: float, tokens: float, point: np.ndarray) -> float:
        """ln loss above that at settings."""
        u, v = point - self.optimum(group, params, tokens)
        return float(self.valley(np.asarray(u), np.asarray(v)))


def plant_log(
    seed: int, groups: int = 4, sizes: int = 5, horizons: int = 3, trials: int = 12
) -> PlantedLog:
    """A log of `trials` random settings of each group, size and horizon."""
    rng = np.random.default_rng([seed, 5])
    valley, _ = plant_valley(rng, SHAPES[seed % 2])
    slopes = np.array([[rng.normal(-0.35, 0.1), rng.normal(0.05, 0.1)],
                       [rng.normal(0.1, 0.1), rng.normal(0.45, 0.1)]])  # fmt: skip
    known = ("adamw", "muon", "soap", "lion", *(f"optimizer{k}" for k in range(5, groups + 1)))
    plain = PlantedLog(
        table=pd.DataFrame(),
        sizes=np.geomspace(3e7, 5e8, sizes),
        ratios=20 * 2.0 ** np.arange(horizons),
        groups=known[:groups],
        moves=rng.normal(0, [0.5, 0.2, 0.01], (groups, 3)),
        centre=np.log([4e-3, 2e5]) + rng.normal(0, 0.3, 2),
        slopes=slopes,
        valley=valley,
        cut=0,
        wrong=0,
    )
    rows = [
        _run(plain, group, params, ratio, rng)
        for group in plain.groups
        for params in plain.sizes
        for ratio in plain.ratios
        for _ in range(trials)
    ]
    table = pd.DataFrame(rows)
    order = rng.permutation(len(table))
    cut = order[: round(CUT_SHORT * len(table))]
    wrong = order[len(cut) : len(cut) + round(WRONG_UNITS * len(table))]
    share = rng.uniform(0.3, 0.95, len(cut))
    table.loc[cut, "global_step"] = (table.loc[cut, "max_steps"] * share).astype(int)
    table.loc[cut, "val_loss"] *= share**-0.1 * 1.02
    for k, row in enumerate(wrong):
        column, factor = [("n_params", 1e-6), ("train_tokens", 1e-9), ("val_loss", 0.5)][k % 3]
        table.loc[row, column] *= factor
    return PlantedLog(**{**vars(plain), "table": table, "cut": len(cut), "wrong": len(wrong)})


def _run(
    log: PlantedLog, group: str, params: float, ratio: float, rng: np.random.Generator
) -> dict[str, object]:
    tokens = params * ratio
    best = log.optimum(group, params, tokens)
    rate = float(np.exp(best[0] + rng.normal(0, 0.7)))
    sequences = max(1, round(float(np.exp(best[1] + rng.normal(0, 0.7))) / SEQUENCE))
    decay = float(rng.choice([0.0333, 0.1, 0.3]))
    point = np.log([rate, sequences * SEQUENCE])
    gap = log.gap(group, params, tokens, point)
    loss = log.lowest(group, params, tokens) * np.exp(
        gap + DECAY * np.log(decay / 0.1) ** 2 + (NOISE + 0.1 * gap) * rng.standard_normal()
    )
    ragged = tokens * (1 + rng.uniform(-0.001, 0.001))
    steps = round(ragged / (sequences * SEQUENCE))
    return {
        "optimizer": group, "n_params": params, "train_tokens": ragged, "lr": rate,
        "bs": sequences, "seq_len": SEQUENCE, "weight_decay": decay, "max_steps": steps,
        "global_step": steps, "val_loss": float(loss), "gpu": "H100", "node": "a1", "comment": "",
    }  # fmt: skip


def measure_log(seed: int) -> dict[str, object]:
    """What one planted log shows."""
    log = plant_log(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        log.table.to_csv(path, index=False)
        found = read_source("csv", path)
        results = Results.open(Path(folder) / "results", create=True)
        results.write_many(found.rows)
        said = "\n".join(said_of_import(found, results.to_pandas(), "results"))
    excluded = found.rows["excluded"].dropna()
    cut = int(excluded.str.startswith("cut short").sum())
    named = {
        "cut": cut >= log.cut,
        "wrong": int((~excluded.str.startswith("cut short")).sum()) >= log.wrong,
        "ignored": bool(re.search("columns ignored: " + ", ".join(USELESS), said)),
    }
    largest = log.sizes[-1] * 0.99
    condition = f"params_active_non_embedding {{}} {largest}"
    choice: dict[str, object] = {"group": "optimizer", "also": "weight_decay"}
    frame = found.rows
    fits = fit(frame, where=condition.format("<"), **choice)  # pyright: ignore[reportArgumentType]
    score = fits.score(frame.query(condition.format(">")))
    regret, held, off = [], [], []
    for group in log.groups:
        for ratio in log.ratios:
            params, tokens = float(log.sizes[-1]), float(log.sizes[-1] * ratio)
            answer = fits.recommend(None, params, tokens, group=group)
            point = np.log([answer.learning_rate, answer.batch_tokens])
            gap = log.gap(group, params, tokens, point)
            true = log.lowest(group, params, tokens)
            regret.append(100 * float(np.expm1(gap)))
            held.append(answer.loss_interval[0] <= true <= answer.loss_interval[1])
            off.append(answer.loss - true)
    return {
        "seed": seed,
        "rows": len(log.table),
        "named": named,
        "regret": regret,
        "held": held,
        "loss_off": float(np.mean(np.abs(off))),
        "mae": score.overall.mae,
        "rank_correlation": score.overall.rank_correlation,
        "coverage": score.overall.coverage,
    }


def measure_logs(draws: int) -> dict[str, object]:
    """Over `draws` logs."""
    found = []
    for seed in range(draws):
        found.append(measure_log(seed))
        print(json.dumps({k: v for k, v in found[-1].items() if k not in ("regret", "held")}))
    regret = np.array([f["regret"] for f in found])
    held = np.array([f["held"] for f in found])
    means = regret.mean(1)
    return {
        "draws": draws,
        "all_named": sum(all(f["named"].values()) for f in found),
        "regret_percent": {
            "mean": float(regret.mean()),
            "median": float(np.median(regret)),
            "p90": float(np.quantile(regret, 0.9)),
            "draws_up_to_0.1": int((means <= 0.1).sum()),
        },
        "loss_inside": [int(held.sum()), int(held.size)],
        "mae": float(np.mean([f["mae"] for f in found])),
        "coverage": float(np.mean([f["coverage"] for f in found])),
        "runs": found,
    }


def measure_size(rows: int = 2000, groups: int = 11) -> dict[str, object]:
    """Seconds of import, fit and report (by the clock, and of CPU), and the page's bytes."""
    log = plant_log(0, groups=groups, sizes=5, horizons=3, trials=-(-rows // (groups * 15)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        log.table[:rows].to_csv(path, index=False)
        clock = [_now()]
        found = read_source("csv", path)
        results = Results.open(Path(folder) / "results", create=True)
        results.write_many(found.rows)
        lines = said_of_import(found, results.to_pandas(), "results")
        clock.append(_now())
        fits = fit(results, group="optimizer")
        assert fits.summary()
        clock.append(_now())
        page = write_report(results, Path(folder) / "page", fits=fits)
        clock.append(_now())
        size = page.stat().st_size
    return {
        "rows": min(rows, len(log.table)),
        "groups": groups,
        "lines": len(lines),
        **{
            name: {"seconds": late[0] - early[0], "cpu": late[1] - early[1]}
            for name, early, late in zip(
                ("import", "fit", "report"), clock[:-1], clock[1:], strict=True
            )
        },
        "page_bytes": size,
    }


def example_table() -> pd.DataFrame:
    """The log of the example page: small, two optimizers."""
    table = plant_log(3, groups=2, sizes=4, horizons=2, trials=9).table
    table = table.drop(columns="comment")
    for name in ("n_params", "train_tokens", "lr", "val_loss"):
        table[name] = [float(f"{value:.7g}") for value in table[name]]
    return table


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = make_parser("imports", __doc__)
    parser.add_argument("kind", choices=("log", "size", "table"))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args(arguments)
    if options.kind == "table":
        print(example_table().to_csv(index=False), end="")
        return
    found = measure_logs(options.draws) if options.kind == "log" else measure_size(options.rows)
    print(json.dumps({k: v for k, v in found.items() if k != "runs"}, indent=1))
    save(options.json, found)


if __name__ == "__main__":
    start(main)
