"""Planted studies: laws and valleys that are known, searched or swept, judged against the truth.

`python -m benchmarks.planted KIND [--seeds S] [--json FILE]`, KIND one of

    studies    random power laws over 12 cells, searched with few trials a cell
    wide       45 cells over factors of 20 in N and 50 in D; optima by OpenEuroLLM's law, which the
               prior leaves out; losses with a floor that depart from any plane in ln N, ln D
    groups     eleven groups of runs over the cells of two sizes, pooled and each alone
    one_batch  sweeps of the learning rate at one batch
    one_size   three horizons of one recorded size (--grids FILE), asked for ten times that size

No valley is of the model's family: a tilted parabola, or one steeper on some sides than on others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import optuna

from benchmarks.entry import make_parser, save, start
from benchmarks.recorded import read_grids
from benchmarks.search import CellSearch
from raysweep.errors import UserError
from raysweep.scaling.optima.literature import PUBLISHED_LAWS, OptimumPrior, literature_prior
from raysweep.scaling.optima.surface import Surface, fit_surface
from raysweep.search.history import TrialHistory
from raysweep.study.shape import RunSize

SHAPES = ("parabola", "lopsided")
SEQUENCE = 2048
BOUNDS = ((1e-4, 3e-2), (4, 11))
_DIVERGES = 1.0  # gap in ln loss beyond which a run counts as diverged
_NOISE_GROWS = 0.1  # noise sd per unit of gap

Valley = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PlantedStudy:
    """A ladder of cells with known optima. Points are (ln learning rate, ln batch tokens)."""

    cells: tuple[RunSize, ...]  # in order of compute
    exponents: dict[tuple[str, str], float]  # of (a target, "params" or "tokens")
    optima: dict[str, np.ndarray]
    lowest: dict[str, float]  # loss at the optimum
    valley: Valley
    noise: float  # sd of ln loss at the optimum
    seed: int
    bounds: tuple[tuple[float, float], tuple[float, float]] = BOUNDS
    depth: dict[str, float] = field(default_factory=dict)  # of a cell's valley; 1 by default

    def gap(self, cell: RunSize, point: np.ndarray) -> float:
        """The true ln loss above the cell's optimum."""
        u, v = np.asarray(point) - self.optima[cell.name]
        return self.depth.get(cell.name, 1.0) * float(self.valley(np.asarray(u), np.asarray(v)))

    def loss(self, cell: RunSize, point: np.ndarray, rng: np.random.Generator) -> float:
        """Of one run; nan where it diverges."""
        gap = self.gap(cell, point)
        if gap > _DIVERGES:
            return np.nan
        sd = self.noise + _NOISE_GROWS * gap
        return self.lowest[cell.name] * float(np.exp(gap + sd * rng.standard_normal()))


def plant_valley(rng: np.random.Generator, shape: str) -> tuple[Valley, float]:
    """A valley, and the slope of the best ln learning rate in ln batch along it."""
    if shape == "parabola":
        a, b = np.exp(rng.normal(np.log([0.007, 0.005]), 0.4))
        tilt = rng.uniform(-0.8, 0.2) * np.sqrt(a * b)
        return lambda u, v: a * u**2 + b * v**2 + tilt * u * v, float(-tilt / (2 * a))
    low, high, small, large = np.exp(rng.normal(np.log([0.004, 0.012, 0.006, 0.006]), 0.5))
    follow = rng.uniform(0, 1)

    def valley(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        along = u - follow * v
        steep = np.where(along > 1.2, 0.5 * (along - 1.2) ** 2, 0)
        rate = np.where(along > 0, high, low) * along**2
        return rate + steep + np.where(v > 0, large, small) * v**2

    return valley, float(follow)


def plant(
    seed: int,
    shape: str,
    noise: float = 0.001,
    scatter: float = 0.05,
    sizes: tuple[int, int] = (3, 4),
) -> PlantedStudy:
    """A random study: laws, a valley, and optima scattered about the laws by `scatter` (ln)."""
    rng = np.random.default_rng([seed, SHAPES.index(shape)])
    cells = _grid_of_cells(3e7 * 4.0 ** np.arange(sizes[0]), 6e8 * 3.0 ** np.arange(sizes[1]))
    slopes = np.array(
        [
            [rng.normal(-0.6, 0.25), rng.normal(0.2, 0.25)],
            [rng.normal(0.0, 0.12), rng.normal(0.5, 0.15)],
        ]
    )
    logs = _logs(cells)
    centre = np.log([0.003, 2e5]) + rng.normal(0, 0.4, 2)
    optima = centre + (logs - logs.mean(0)) @ slopes.T + rng.normal(0, scatter, (len(cells), 2))
    valley, _ = plant_valley(rng, shape)
    return PlantedStudy(
        cells=cells,
        exponents=_exponents(slopes),
        optima={cell.name: optimum for cell, optimum in zip(cells, optima, strict=True)},
        lowest={c.name: _loss_law(c) for c in cells},
        valley=valley,
        noise=noise,
        seed=seed,
    )


def plant_wide(seed: int) -> PlantedStudy:
    """The wide ladder: 48M to 983M parameters, 6 to 300 billion tokens."""
    shape = SHAPES[seed % 2]
    rng = np.random.default_rng([seed, 45])
    cells = _grid_of_cells(np.geomspace(4.8e7, 9.8e8, 5), np.geomspace(6e9, 3e11, 9))
    law = PUBLISHED_LAWS["openeurollm"]
    answers = [(law.learning_rate(c), law.batch_tokens(c)) for c in cells]
    by_law = np.log(np.array(answers, dtype=float))
    optima = by_law + rng.normal(0, 0.08, by_law.shape)
    n, d = (_logs(cells) - np.log([2e8, 2e10])).T
    # A floor, and 1 to 2 % of departure that no plane in ln N and ln D and no sum of terms follows.
    bent = 0.008 * np.sin(n - 0.7 * d + rng.uniform(0, 6)) + 0.003 * n * d
    bent = bent + 0.004 * rng.standard_normal(len(cells))
    valley, _ = plant_valley(rng, shape)
    slopes = np.array([[-0.417, 0.086], [0.145, 0.460]])
    return PlantedStudy(
        cells=cells,
        exponents=_exponents(slopes),
        optima={cell.name: optimum for cell, optimum in zip(cells, optima, strict=True)},
        lowest={
            c.name: float(
                (1.75 + 430 / c.params_active_non_embedding**0.34 + 1800 / c.tokens**0.36)
                * np.exp(b)
            )
            for c, b in zip(cells, bent, strict=True)
        },
        valley=valley,
        noise=0.0007,
        seed=seed,
        bounds=((5e-5, 3e-2), (5, 13)),
        depth={
            c.name: float(np.exp(0.05 * x - 0.1 * y)) for c, x, y in zip(cells, n, d, strict=True)
        },
    )


def plant_groups(seed: int, groups: int = 11) -> PlantedStudy:
    """Groups over four cells of two sizes: each its own rate, batch and loss, one valley."""
    rng = np.random.default_rng([seed, 11])
    plain = plant(seed, SHAPES[seed % 2], scatter=0.05, sizes=(2, 2))
    moves = rng.normal(0, [0.6, 0.3, 0.02], (groups, 3))
    cells, optima, lowest = [], {}, {}
    for cell in plain.cells:
        for g, move in enumerate(moves):
            one = replace(cell, group=f"g{g}", name=f"{cell.name} g{g}")
            cells.append(one)
            optima[one.name] = plain.optima[cell.name] + move[:2] + rng.normal(0, 0.05, 2)
            lowest[one.name] = plain.lowest[cell.name] * float(np.exp(move[2]))
    return replace(plain, cells=tuple(cells), optima=optima, lowest=lowest)


def search(
    study: PlantedStudy,
    trials: int = 4,
    first: int = 10,
    prior: OptimumPrior | None = None,
) -> tuple[Surface, bool]:
    """Search every cell in order with the ladder: the fitted surface, and if every fit settled."""
    rng = np.random.default_rng(study.seed)
    history, settled = TrialHistory(prior), True
    searches = [
        CellSearch(
            history,
            cell,
            study.bounds,
            SEQUENCE,
            lambda point, cell=cell: (point, study.loss(cell, point, rng)),
            trials=trials,
            seed=study.seed,
        )
        for cell in study.cells
    ]
    for position, one in enumerate(searches):
        for _ in range(first if position == 0 else trials):
            one.run()
            settled &= history.surface().status == "converged"
    return history.surface(), settled


def sweep_one_batch(
    seed: int, prior: OptimumPrior | None = None, batch: float = 2.0**18
) -> tuple[Surface, dict[tuple[str, str], float]]:
    """A sweep of six learning rates a cell at one batch: the surface, and the true exponents of the
    rate at that batch."""
    rng = np.random.default_rng([seed, 1])
    shape = SHAPES[seed % 2]
    study = plant(seed, shape)
    _, slope = plant_valley(_after_laws(seed, shape, len(study.cells)), shape)
    rows = []
    for i, cell in enumerate(study.cells):
        best = study.optima[cell.name]
        middle = best[0] + slope * (np.log(batch) - best[1]) + rng.uniform(-0.5, 0.5)
        for rate in middle + 0.5 * (np.arange(6) - 2.5):
            point = np.array([rate, np.log(batch)])
            rows.append((i, rate, study.loss(cell, point, rng)))
    index, rate, loss = np.array(rows).T
    surface = fit_surface(
        study.cells, index.astype(int), np.exp(rate), np.full(len(rate), batch), loss, prior=prior
    )
    true = {
        ("learning_rate", name): study.exponents["learning_rate", name]
        - slope * study.exponents["batch_tokens", name]
        for name in ("params", "tokens")
    }
    return surface, true


def _after_laws(seed: int, shape: str, cells: int) -> np.random.Generator:
    """The generator of `plant` where it draws the valley."""
    rng = np.random.default_rng([seed, SHAPES.index(shape)])
    rng.normal(size=4)
    rng.normal(0, 0.4, 2)
    rng.normal(0, 1, (cells, 2))
    return rng


def held(surface: Surface, exponents: dict[tuple[str, str], float]) -> list[bool]:
    """Whether the 95 % interval of each exponent holds the true one."""
    found = []
    for key, true in exponents.items():
        interval = surface.laws.exponent(*key)
        found.append(interval.low <= true <= interval.high)
    return found


def recommended_gaps(study: PlantedStudy, surface: Surface) -> np.ndarray:
    """[cells], true gaps of the recommendations, in per cent."""
    return 100 * np.array([study.gap(c, surface.optimum(c).mean) for c in study.cells])


def optima_held(study: PlantedStudy, surface: Surface) -> np.ndarray:
    """[cells, 2] bool: whether the 95 % intervals of rate and batch hold the true optimum."""
    found = []
    for cell in study.cells:
        low, high = surface.optimum(cell).interval().T
        found.append((low <= study.optima[cell.name]) & (study.optima[cell.name] <= high))
    return np.array(found)


# ---------------------------------------------------------------------- what is measured


def measure_studies(seeds: int, trials: int = 4) -> dict[str, object]:
    """Coverage of the exponents of random studies, and gaps of the recommendations."""
    said: dict[str, object] = {"seeds": seeds, "trials": trials}
    for shape in SHAPES:
        studies = [plant(i, shape) for i in range(seeds)]
        surfaces = [search(study, trials)[0] for study in studies]
        inside = [held(s, p.exponents) for s, p in zip(surfaces, studies, strict=True)]
        gaps = np.concatenate(list(map(recommended_gaps, studies, surfaces)))
        said[shape] = {
            "exponents_inside": float(np.mean(inside)),
            "studies_inside": int(np.all(inside, 1).sum()),
            **_spread(gaps),
        }
    return said


def measure_wide(seeds: int, trials: int = 3) -> dict[str, object]:
    """Gaps, convergence and coverage on the wide ladder, one entry a seed."""
    runs = []
    for seed in range(seeds):
        study = plant_wide(seed)
        surface, settled = search(study, trials, prior=literature_prior(["openeurollm"]))
        gaps = recommended_gaps(study, surface)
        runs.append(
            {
                "converged": settled,
                "inside": held(surface, study.exponents),
                "optima_inside": optima_held(study, surface).mean(0).tolist(),
                **_spread(gaps),
            }
        )
        print(f"seed {seed}: {runs[-1]}", flush=True)
    return {
        "trials": trials,
        "mean": float(np.mean([r["mean"] for r in runs])),
        "max": float(np.max([r["max"] for r in runs])),
        "converged": sum(bool(r["converged"]) for r in runs),
        "exponents_inside": float(np.mean([r["inside"] for r in runs])),
        "runs": runs,
    }


def measure_groups(seeds: int, trials: int = 3) -> dict[str, object]:
    """Groups fitted together against each group alone, on the same trials."""
    rows = []
    for seed in range(seeds):
        study = plant_groups(seed)
        surface, _ = search(study, trials, first=trials)
        alone = []
        for group in surface.design.groups:
            own = [i for i, cell in enumerate(surface.cells) if cell.group == group]
            seen = surface.observed
            rows_of = np.isin(seen.cell, own)
            part = fit_surface(
                [surface.cells[i] for i in own],
                np.searchsorted(own, seen.cell[rows_of]),
                np.exp(seen.point[rows_of, 0]),
                np.exp(seen.point[rows_of, 1]),
                np.where(seen.diverged, np.nan, np.exp(seen.log_loss))[rows_of],
                batch_searched=True,
            )
            alone += recommended_gaps(replace(study, cells=part.cells), part).tolist()
        rows.append(
            {
                "optima_inside": optima_held(study, surface).mean(0).tolist(),
                "pooled": float(recommended_gaps(study, surface).mean()),
                "alone": float(np.mean(alone)),
            }
        )
        print(f"seed {seed}: {rows[-1]}", flush=True)
    return {
        "trials": trials,
        "optima_inside": np.mean([r["optima_inside"] for r in rows], 0).tolist(),
        "pooled": float(np.mean([r["pooled"] for r in rows])),
        "alone": float(np.mean([r["alone"] for r in rows])),
        "runs": rows,
    }


def measure_one_batch(seeds: int) -> dict[str, object]:
    """How often the exponents of the rate at the batch that was run lie in their intervals."""
    inside, widths, ruled = [], [], 0
    for seed in range(seeds):
        surface, true = sweep_one_batch(seed)
        ruled += surface.batch_rule is not None
        inside.append(held(surface, true))
        found = [surface.laws.exponent(*key) for key in true]
        widths.append([e.high - e.low for e in found])
    return {
        "seeds": seeds,
        "detected": ruled,
        "params_inside": int(np.sum(inside, 0)[0]),
        "tokens_inside": int(np.sum(inside, 0)[1]),
        "both_inside": int(np.all(inside, 1).sum()),
        "mean_width": np.mean(widths, 0).tolist(),
    }


def measure_one_size(grids: str, times: float = 10.0) -> dict[str, object]:
    """One recorded size with three horizons or more, asked for `times` that size."""
    every = read_grids(grids)
    by_size: dict[float, list] = {}
    for grid in every:
        by_size.setdefault(grid.cell.params_active_non_embedding, []).append(grid)
    prior = literature_prior(["step_law"])
    law, found = PUBLISHED_LAWS["step_law"], []
    for size, of_size in by_size.items():
        if len(of_size) < 3:
            continue
        of_size = of_size[:3]
        index = np.repeat(np.arange(len(of_size)), [len(g.loss) for g in of_size])
        rate, batch = np.exp(np.concatenate([g.point for g in of_size])).T
        loss = np.concatenate([g.loss for g in of_size])
        surface = fit_surface([g.cell for g in of_size], index, rate, batch, loss, prior=prior)
        middle = of_size[1].cell
        asked = RunSize(params_active_non_embedding=times * size, tokens=middle.tokens)
        answer = surface.optimum(asked).estimates()
        true = law.learning_rate(asked), law.batch_tokens(asked)
        found.append(
            {
                "params": size,
                "unspanned": surface.unspanned(asked),
                "exponent": asdict(surface.laws.exponent("learning_rate", "params")),
                "prior_exponent": float(surface.laws.prior_mean[1]),
                "learning_rate": asdict(answer[0]),
                "batch_tokens": asdict(answer[1]),
                "step_law": true,
                "inside": [a.low <= t <= a.high for a, t in zip(answer, true, strict=True) if t],
            }
        )
        print(found[-1])
    if not found:
        raise UserError(f"{grids}: no size has three horizons")
    return {"sizes": found}


def _spread(gaps: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(gaps.mean()),
        "p90": float(np.quantile(gaps, 0.9)),
        "max": float(gaps.max()),
    }


def _logs(cells: Sequence[RunSize]) -> np.ndarray:
    return np.log([(c.params_active_non_embedding, c.tokens) for c in cells])


def _grid_of_cells(params: np.ndarray, tokens: np.ndarray) -> tuple[RunSize, ...]:
    cells = [
        RunSize(params_active_non_embedding=n, tokens=d, name=f"{n:.3g}-{d:.3g}")
        for n in params
        for d in tokens
    ]
    return tuple(sorted(cells, key=lambda cell: cell.compute))


def _exponents(slopes: np.ndarray) -> dict[tuple[str, str], float]:
    """Of [2, 2]: rows learning rate and batch, columns params and tokens."""
    names = [(t, c) for t in ("learning_rate", "batch_tokens") for c in ("params", "tokens")]
    return dict(zip(names, slopes.ravel().tolist(), strict=True))


def _loss_law(cell: RunSize) -> float:
    return 1.7 + 320 / cell.params_active_non_embedding**0.34 + 400 / cell.tokens**0.28


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = make_parser("planted", __doc__)
    parser.add_argument("kind", choices=("studies", "wide", "groups", "one_batch", "one_size"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, help="a cell; 4 for studies, else 3")
    parser.add_argument("--grids", help="a Step Law CSV or a results folder, for one_size")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.kind == "studies":
        said = measure_studies(options.seeds, options.trials or 4)
    elif options.kind == "wide":
        said = measure_wide(options.seeds, options.trials or 3)
    elif options.kind == "groups":
        said = measure_groups(options.seeds, options.trials or 3)
    elif options.kind == "one_batch":
        said = measure_one_batch(options.seeds)
    elif options.grids is None:
        raise UserError("one_size needs --grids")
    else:
        said = measure_one_size(options.grids)
    print(json.dumps({k: v for k, v in said.items() if k not in ("runs", "sizes")}, indent=1))
    save(options.json, said)


if __name__ == "__main__":
    start(main)
