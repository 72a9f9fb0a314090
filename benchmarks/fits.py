"""The fits against what is known: published minima, planted truths and SciPy.

    python -m benchmarks.fits --data FOLDER [--only chinchilla,speed,...] [--json FILE]

FOLDER holds `chinchilla_points.csv` and `steplaw_dense.csv`. The parts: `chinchilla` (the minimum
and the spread of its bootstrap), `speed` (1000 refits against a multi-start SciPy L-BFGS with
numerical gradients, which is run on some of the same resamples and scaled up), `planted` (every law
gets its coefficients back), `coverage` (95 % intervals of exponents over simulated studies),
`steplaw` (what following the laws of the optima costs on recorded grids, fitted on the smallest
cells and on all). Budgets are held out by `benchmarks.ahead`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from benchmarks import huber_solver as solver
from benchmarks.entry import make_parser, save, start
from benchmarks.huber_fit import cell_multiplicities, fit_law, resample
from benchmarks.planted_laws import PLANTED, simulated_cells
from raysweep.errors import UserError
from raysweep.results.published import read_steplaw
from raysweep.scaling.fit import fit as fit_results
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.laws import LOSS_LAWS

CHINCHILLA = LOSS_LAWS["chinchilla"]
# Cells of a simulated study and the noise of their log loss: as many and as little as a law of that
# many coefficients needs. On 120 cells at 0.004, Yun's exponent of the experts' term is known only
# to its range of 0.05 to 4, so that coverage of it would say nothing.
STUDIES = {
    "chinchilla": (48, 0.004),
    "wang": (60, 0.004),
    "three_term": (60, 0.004),
    "joint_moe": (120, 0.004),
    "yun": (200, 0.002),
    "sparsity": (200, 0.002),
}
USUAL_STUDY = (80, 0.004)
STUDY_RESAMPLES = 300
# Starts of the SciPy peer: the corners of the middle of Hoffmann et al.'s grid.
PEER_STARTS = [
    np.array([0.5, *start])
    for start in itertools.product((5.0, 10.0), (5.0, 10.0), (0.25, 0.5), (0.25, 0.5))
]


def read_chinchilla(folder: Path, drop: int = 5) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs and losses of Hoffmann et al.'s figure 4, the `drop` of least tokens a parameter
    out."""
    table = pd.read_csv(folder / "chinchilla_points.csv")
    params, flops, loss = table[["Model Size", "Training FLOP", "loss"]].to_numpy().T
    tokens = flops / (6 * params)
    keep = np.argsort(tokens / params)[drop:]
    return {"params": params[keep], "tokens": tokens[keep]}, loss[keep]


def scipy_chinchilla(
    inputs: dict[str, np.ndarray], loss: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """The peer: best of PEER_STARTS L-BFGS runs with numerical gradients -> (coefficients,
    objective)."""
    n, d, y = np.log(inputs["params"]), np.log(inputs["tokens"]), np.log(loss)

    def objective(x: np.ndarray) -> float:
        terms = np.stack([np.full_like(n, x[0]), x[1] - x[3] * n, x[2] - x[4] * d])
        top = terms.max(axis=0)
        residual = top + np.log(np.exp(terms - top).sum(axis=0)) - y
        return float((weights * solver.huber(residual, solver.HUBER)).sum())

    options = {"maxiter": 2000, "maxfun": 20000, "ftol": 1e-12, "gtol": 1e-8}
    runs = [minimize(objective, x, method="L-BFGS-B", options=options) for x in PEER_STARTS]
    best = min(runs, key=lambda run: run.fun)
    values = np.array([*np.exp(best.x[:3]), *best.x[3:]])
    return values, float(best.fun)


def chinchilla(folder: Path) -> dict[str, object]:
    """The minimum on Hoffmann et al.'s points, and the spread of its bootstrap."""
    inputs, loss = read_chinchilla(folder)
    fit = fit_law(CHINCHILLA, LossData.of(inputs, loss), bootstrap=4000)
    reference = np.log(CHINCHILLA.predict(CHINCHILLA.published, inputs) / loss)
    at_published = float(solver.huber(reference, solver.HUBER).sum())
    print(
        f"objective {fit.objective:.8f} (published coefficients: {at_published:.8f}), {fit.status}"
    )
    print("  " + "  ".join(f"{k} {v:.5g}" for k, v in fit.coefficients.items()))
    published = {"E0": 0.026, "a": 0.015, "b": 0.021, "N_opt exponent": 0.020}
    sds = {name: float(np.std(fit.draws(name), ddof=1)) for name in published}
    for name, sd in sds.items():
        print(f"  sd of {name}: {sd:.4f} (published {published[name]:.3f}, 4000 resamples)")
    return {"fit": fit.to_dict(), "objective_at_published": at_published, "sds": sds}


def speed(folder: Path, resamples: int = 1000, peer_resamples: int = 10) -> dict[str, object]:
    """Bootstrap refits against the peer on the same resamples."""
    inputs, loss = read_chinchilla(folder)
    fit = fit_law(CHINCHILLA, LossData.of(inputs, loss))
    times, refits = [], fit
    for _ in range(5):
        begun = time.perf_counter()
        refits = resample(fit, resamples)
        times.append(time.perf_counter() - begun)
    ours = float(np.median(times))
    weights = cell_multiplicities(fit.cells, resamples, np.random.default_rng(0))
    begun = time.perf_counter()
    peers = [scipy_chinchilla(inputs, loss, w) for w in weights[:peer_resamples]]
    peer = (time.perf_counter() - begun) / peer_resamples * resamples
    assert refits.samples is not None
    y = np.log(loss)
    excess = []
    for values, w, (_, objective) in zip(refits.samples, weights, peers, strict=False):
        residual = np.log(CHINCHILLA.predict(values, inputs)) - y
        excess.append(objective / float((w * solver.huber(residual, solver.HUBER)).sum()) - 1)
    print(
        f"{resamples} refits: {ours:.2f} s (median of 5: {min(times):.2f}-{max(times):.2f}), "
        f"{refits.n_failed} not converged, {os.cpu_count()} cores"
    )
    print(
        f"  SciPy L-BFGS, {len(PEER_STARTS)} starts, numerical gradients: {peer:.0f} s for as many "
        f"(measured on {peer_resamples}), {peer / ours:.0f} times ours; one start alone "
        f"{peer / ours / len(PEER_STARTS):.0f} times"
    )
    print(f"  its objective above ours, relative: {min(excess):.1e} to {max(excess):.1e}")
    return {
        "resamples": resamples,
        "seconds": times,
        "not_converged": refits.n_failed,
        "peer_seconds": peer,
        "peer_measured_on": peer_resamples,
        "ratio": peer / ours,
        "peer_relative_excess": excess,
    }


def planted() -> dict[str, object]:
    """Largest relative error of a coefficient, by law, fitted to its own noise-free predictions."""
    worst = {}
    for key, law in LOSS_LAWS.items():
        inputs = simulated_cells(key)
        begun = time.perf_counter()
        fit = fit_law(law, LossData.of(inputs, law.predict(PLANTED[key], inputs)))
        seconds = time.perf_counter() - begun
        worst[key] = max(abs(fit.coefficients[k] / v - 1) for k, v in PLANTED[key].items())
        print(f"{key:12s} {worst[key]:.1e} in {seconds:.2f} s, {fit.status}: {fit.message}")
    return worst


def coverage(laws: Sequence[str], studies: int) -> dict[str, object]:
    """How often the 95 % interval of each exponent holds the truth, in per cent."""
    table = {}
    for key in laws:
        law, (n, scatter) = LOSS_LAWS[key], STUDIES.get(key, USUAL_STUDY)
        truth = {k: np.asarray(v) for k, v in PLANTED[key].items()}
        names = [c.name for c in law.expression.coefficients if c.kind == "exponent"]
        names += [name for name in law.derived if name.endswith("exponent")]
        inside, used, failed = dict.fromkeys(names, 0), 0, 0
        for study in range(studies):
            inputs = simulated_cells(key, n, seed=study)
            noise = np.random.default_rng(10_000 + study).normal(0, scatter, n)
            loss = law.predict(PLANTED[key], inputs) * np.exp(noise)
            fit = fit_law(law, LossData.of(inputs, loss), bootstrap=STUDY_RESAMPLES, seed=study)
            if not fit.ok:
                continue
            used, failed = used + 1, failed + fit.n_failed
            for name in names:
                low, high = fit.coefficient_interval(name)
                known = truth[name] if name in truth else law.derived[name](truth)
                inside[name] += bool(low <= known <= high)
        table[key] = {name: 100 * hits / max(used, 1) for name, hits in inside.items()}
        shares = "  ".join(f"{name} {share:.1f}" for name, share in table[key].items())
        print(
            f"{key:12s} {shares}   ({used} of {studies} studies of {n} cells, noise {scatter}, "
            f"{failed} of {used * STUDY_RESAMPLES} refits not converged)",
            flush=True,
        )
    return table


def steplaw(folder: Path) -> dict[str, object]:
    """The gap of the laws of the optima to the best recorded trial of each cell, in per cent."""
    rows = read_steplaw(folder / "steplaw_dense.csv")
    held = fit_results(rows).held_out
    assert held is not None
    gaps = np.array([c.regret for c in held.cells])
    known = gaps[np.isfinite(gaps)]
    told = {"mean": held.mean_regret, "max": float(known.max()), "cells": len(known)}
    print(
        f"{len(known)} largest cells, fitted on the {held.n_train} smallest: mean regret "
        f"{100 * held.mean_regret:.3f} %, max {100 * known.max():.3f} %"
    )
    return {"held out": told}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints what it measures and writes JSON where asked."""
    parts = ("chinchilla", "speed", "planted", "coverage", "steplaw")
    parser = make_parser("fits", __doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default=",".join(parts), help="comma-separated")
    parser.add_argument("--laws", default=",".join(LOSS_LAWS), help="of the coverage part")
    parser.add_argument("--studies", type=int, default=200)
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    for name in chosen:
        if name not in parts:
            raise UserError(f"no part '{name}': choose from {', '.join(parts)}")
    if {"chinchilla", "speed", "steplaw"} & set(chosen) and not options.data.is_dir():
        raise UserError(f"no folder {options.data}: name the one with the public sweeps by --data")
    run = {
        "chinchilla": lambda: chinchilla(options.data),
        "speed": lambda: speed(options.data),
        "planted": planted,
        "coverage": lambda: coverage(options.laws.split(","), options.studies),
        "steplaw": lambda: steplaw(options.data),
    }
    report = {}
    for name in chosen:
        print(f"== {name}")
        report[name] = run[name]()
    save(options.json, report)


if __name__ == "__main__":
    start(main)
