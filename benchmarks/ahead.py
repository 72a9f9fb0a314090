"""How the model of the loss predicts larger budgets than it saw, against published procedures.

    python -m benchmarks.ahead FILE... [--json FILE]

Each FILE is an IsoFLOP table (`tokens, params, budget, loss`, and `outlier, reason` if there) or
Chinchilla's points (`Model Size, Training FLOP, loss`), read by the project's importers; runs
flagged as outliers stay out. The budgets (levels of compute, where none was held) above a split
are held out: the largest (`top budget`), or the larger half of them (`top half`). Of each split:

- `n` runs, of which `covered` lie in the 95 % interval of a new run, of mean relative `width`;
  `mae` in nats;
- `law_alone`: the same of the law by Huber's loss with the intervals of its bootstrap and scatter;
- `mae_hoffmann`: Huber (1e-3) on ln loss, L-BFGS from Hoffmann et al.'s grid of starts;
  `mae_vpnls`: squares, exponents by variable projection (Czech et al., arXiv 2603.22339);
  `mae_approach2`: a parabola a budget, its minimum and height as power laws of compute;
- `n_opt_inside` of `n_opt`: held budgets whose best size, by a parabola through the runs within a
  factor of 4 of the best, lies in the interval of the model's split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls

from benchmarks.entry import make_parser, save, start
from benchmarks.huber_fit import fit_law
from benchmarks.huber_solver import HUBER, huber
from raysweep.results.importers import import_file
from raysweep.scaling.compute.allocation import compute_optimal
from raysweep.scaling.compute.isoflop import isoflop, read_minimum
from raysweep.scaling.loss.data import COLUMNS, LossData
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.selection import choose_loss

RESAMPLES = 1000
GRID = (
    (-1.0, -0.5, 0.0, 0.5, 1.0),
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
)
"""Starts of Hoffmann et al.: ln E, ln A, ln B, a, b."""
POLISHED = 60
"""Of the grid's starts, the best are descended from."""


def read_runs(path: Path) -> dict[str, LossData]:
    """The runs of a file that count, by experiment."""
    head = pd.read_csv(path, nrows=0).columns
    rows = import_file("chinchilla" if "Model Size" in head else "isoflop", path)
    rows = rows[rows["excluded"].isna()]
    found = {}
    for name, own in rows.groupby("architecture", sort=False):
        columns = {c: own[c].to_numpy(float) for c in COLUMNS if c in own}
        label = path.stem if rows["architecture"].nunique() == 1 else f"{path.stem}: {name}"
        found[label] = LossData.of(columns, own["loss"].to_numpy(float))
    return found


def splits(level: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows [n] are held out: those of the largest level, of the larger half of levels."""
    count = level.max() + 1
    return {"top budget": level == level.max(), "top half": level >= count - count // 2}


def hoffmann(seen: LossData, held: LossData) -> np.ndarray:
    """Predicted losses [m] by Hoffmann et al.'s approach 3, the best of many L-BFGS descents."""
    n, d, y = (np.log(v) for v in (*_sizes(seen), seen.loss))

    def terms(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = (v[..., None] for v in np.moveaxis(x, -1, 0))
        return np.stack(np.broadcast_arrays(e, a - alpha * n, b - beta * d))

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        parts = terms(x, n, d)
        total = np.logaddexp.reduce(parts, axis=0)
        share, off = np.exp(parts - total), total - y
        pull = np.clip(off, -HUBER, HUBER) * share
        slopes = np.array([*pull.sum(axis=1), -(pull[1] * n).sum(), -(pull[2] * d).sum()])
        return float(huber(off, HUBER).sum()), slopes

    starts = np.array(list(itertools.product(*GRID)))
    off = np.logaddexp.reduce(terms(starts, n, d), axis=0) - y
    best = np.argsort(huber(off, HUBER).sum(axis=1))[:POLISHED]
    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-10}
    runs = [
        minimize(objective, x, jac=True, method="L-BFGS-B", options=options) for x in starts[best]
    ]
    found = min(runs, key=lambda run: run.fun).x
    return np.exp(np.logaddexp.reduce(terms(found, *(np.log(v) for v in _sizes(held))), axis=0))


def variable_projection(seen: LossData, held: LossData) -> np.ndarray:
    """Predicted losses [m] by squares: exponents searched, the rest solved for linearly."""
    n, d = _sizes(seen)
    centre = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())

    def table(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.stack(
            [np.ones_like(n), (n / centre[0]) ** -x[0], (d / centre[1]) ** -x[1]], axis=1
        )

    def residual(x: np.ndarray) -> float:
        return nnls(table(x, n, d), seen.loss)[1] if min(x) > 0 else math.inf

    grid = itertools.product(np.linspace(0.05, 1.5, 16), repeat=2)
    start = min((np.array(x) for x in grid), key=residual)
    found = minimize(residual, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    return table(found.x, *_sizes(held)) @ nnls(table(found.x, n, d), seen.loss)[0]


def approach2(seen: LossData, held: LossData) -> np.ndarray:
    """Predicted losses [m] by parabolas: minimum and height as powers of compute, the mean bend."""
    found = isoflop(*_sizes(seen), seen.loss, seen.flops)
    inside = found.inside
    if len(inside) < 2:
        return np.full(len(held), np.nan)
    flops, loss = (np.log([getattr(p, k) for p in inside]) for k in ("flops", "loss"))
    height = np.polyval(np.polyfit(flops, loss, 1), np.log(held.flops))
    best = np.log(found.coefficient) + found.exponent * np.log(held.flops)
    bend = np.mean([p.curvature for p in inside])
    return np.exp(height + bend * (np.log(_sizes(held)[0]) - best) ** 2)


def judge(data: LossData, out: np.ndarray) -> dict[str, object]:
    """The numbers of one split; see the head of this file."""
    seen, held = data.select(~out), data.select(out)
    model = choose_loss(seen)
    value, low, high = model.predict(held.columns)
    law = LOSS_LAWS["chinchilla"]
    alone = fit_law(law, seen, bootstrap=RESAMPLES)
    at = held.inputs(law)[0]
    plain = alone.predict(at)
    plain_low, plain_high = (
        alone.interval(at, new_observation=True) if alone.ok else np.full((2, len(held)), np.nan)
    )
    level = data.levels()
    read, inside = [], []
    for k in np.unique(level[out]):
        own = data.select(level == k)
        best = read_minimum(_sizes(own)[0], own.loss)
        if math.isfinite(best):
            (split,) = compute_optimal(model, float(np.exp(np.log(own.flops).mean())))
            read.append(best)
            inside.append(split.ok and split.estimate("params").covers(best))

    def mae(predicted: np.ndarray) -> float | None:
        error = float(np.abs(predicted - held.loss).mean())
        return error if math.isfinite(error) else None

    return {
        "law": model.law.key if model.law else None,
        "why": model.why,
        "n": len(held),
        "seen": len(seen),
        "covered": int(((low <= held.loss) & (held.loss <= high)).sum()),
        "width": float(np.mean((high - low) / value)),
        "mae": mae(value),
        "law_alone": {
            "covered": int(((plain_low <= held.loss) & (held.loss <= plain_high)).sum()),
            "width": float(np.mean((plain_high - plain_low) / plain)),
            "mae": mae(plain),
        },
        "mae_hoffmann": mae(hoffmann(seen, held)),
        "mae_vpnls": mae(variable_projection(seen, held)),
        "mae_approach2": mae(approach2(seen, held)),
        "n_opt_inside": sum(inside),
        "n_opt": len(read),
    }


def pooled(found: Sequence[dict]) -> dict[str, object]:
    """The same over several files, each run counting alike."""
    n = sum(f["n"] for f in found)

    def mean(values: Sequence[float | None]) -> float | None:
        pairs = [(v, f["n"]) for v, f in zip(values, found, strict=True) if v is not None]
        total = sum(k for _, k in pairs)
        return sum(v * k for v, k in pairs) / total if total else None

    def interval(parts: Sequence[dict]) -> dict[str, object]:
        covered = sum(p["covered"] for p in parts)
        width, error = (mean([p[name] for p in parts]) for name in ("width", "mae"))
        return {"covered": covered, "share": covered / n, "width": width, "mae": error}

    names = ("mae_hoffmann", "mae_vpnls", "mae_approach2")
    return {
        "n": n,
        **interval(found),
        "law_alone": interval([f["law_alone"] for f in found]),
        **{name: mean([f[name] for f in found]) for name in names},
        "n_opt_inside": sum(f["n_opt_inside"] for f in found),
        "n_opt": sum(f["n_opt"] for f in found),
    }


def _sizes(data: LossData) -> tuple[np.ndarray, np.ndarray]:
    """N and D [n], as Chinchilla's law reads them."""
    inputs, _ = data.inputs(LOSS_LAWS["chinchilla"])
    return inputs["params"], inputs["tokens"]


def _line(name: str, split: str, f: dict) -> str:
    alone = f["law_alone"]
    maes = "  ".join(
        f"{short} {f[key]:.4f}" if f[key] is not None else f"{short} -"
        for short, key in (
            ("Hoffmann", "mae_hoffmann"), ("VPNLS", "mae_vpnls"), ("parabolas", "mae_approach2")
        )
    )  # fmt: skip
    return (
        f"{name:28s} {split:10s} {f['covered']:3d}/{f['n']:3d} inside, "
        f"width {100 * f['width']:5.2f} % "
        f"(law alone {alone['covered']:3d}, {100 * alone['width']:5.2f} %)  MAE {f['mae']:.4f} "
        f"(law alone {alone['mae']:.4f}  {maes})  N_opt {f['n_opt_inside']}/{f['n_opt']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints a line a split and writes JSON where asked."""
    parser = make_parser("ahead", __doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args(arguments)
    report: dict[str, dict] = {}
    for path in options.files:
        for name, data in read_runs(path).items():
            report[name] = {s: judge(data, out) for s, out in splits(data.levels()).items()}
            for split, found in report[name].items():
                print(_line(name, split, found), flush=True)
    together = {s: pooled([f[s] for f in report.values()]) for s in ("top budget", "top half")}
    for split, found in together.items():
        print(_line("pooled", split, found))
    save(options.json, {"files": report, "pooled": together})


if __name__ == "__main__":
    start(main)
