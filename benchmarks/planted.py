"""Planted studies: random power laws and valleys, searched by the ladder, judged against the truth.

`python -m benchmarks.planted` prints how often the 95 % intervals of all four exponents hold the
true ones, and the true loss gaps of what is recommended. The valleys are not of the surface model's
family: a tilted parabola, or one steeper on some sides than on others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import TrialState

from raysweep.scaling.surface import CellFeatures, Surface
from raysweep.search.ladder import LEARNING_RATE, LOG2_BATCH, Ladder
from raysweep.search.strategies import make_sampler, search_space

SHAPES = ("parabola", "lopsided")
SEQUENCE = 2048
LEARNING_RATES = (1e-4, 3e-2)
LOG2_BATCHES = (4, 11)
_DIVERGES = 1.0  # gap in ln loss beyond which a run counts as diverged


@dataclass(frozen=True)
class PlantedStudy:
    """A ladder of cells with known optima. Points are (ln learning rate, ln batch tokens)."""

    cells: tuple[CellFeatures, ...]  # in order of compute
    exponents: dict[tuple[str, str], float]  # of ("learning_rate" | "batch", "params" | "tokens")
    optima: dict[str, np.ndarray]
    lowest: dict[str, float]  # loss at the optimum
    valley: Callable[[np.ndarray, np.ndarray], np.ndarray]
    noise: float  # sd of ln loss
    seed: int

    def gap(self, cell: CellFeatures, learning_rate: float, batch_tokens: float) -> float:
        """The true ln loss above the cell's optimum."""
        u, v = np.log([learning_rate, batch_tokens]) - self.optima[cell.name]
        return float(self.valley(np.asarray(u), np.asarray(v)))


def plant(
    seed: int,
    shape: str,
    noise: float = 0.001,
    scatter: float = 0.05,
    sizes: tuple[int, int] = (3, 4),
) -> PlantedStudy:
    """A random study: laws, a valley, and optima scattered about the laws by `scatter` (ln)."""
    rng = np.random.default_rng([seed, SHAPES.index(shape)])
    cells = tuple(
        CellFeatures(f"{params:.3g}-{tokens:.3g}", params, tokens)
        for params in 3e7 * 4.0 ** np.arange(sizes[0])
        for tokens in 6e8 * 3.0 ** np.arange(sizes[1])
    )
    cells = tuple(sorted(cells, key=lambda cell: cell.compute))
    exponents = {
        ("learning_rate", "params"): rng.normal(-0.6, 0.25),
        ("learning_rate", "tokens"): rng.normal(0.2, 0.25),
        ("batch", "params"): rng.normal(0.0, 0.12),
        ("batch", "tokens"): rng.normal(0.5, 0.15),
    }
    logs = np.log([(cell.params, cell.tokens) for cell in cells])
    slopes = np.array(list(exponents.values())).reshape(2, 2)
    centre = np.log([0.003, 2e5]) + rng.normal(0, 0.4, 2)
    optima = centre + (logs - logs.mean(0)) @ slopes.T + rng.normal(0, scatter, (len(cells), 2))
    if shape == "parabola":
        a, b = np.exp(rng.normal(np.log([0.007, 0.005]), 0.4))
        tilt = rng.uniform(-0.8, 0.2) * np.sqrt(a * b)

        def valley(u: np.ndarray, v: np.ndarray) -> np.ndarray:
            return a * u**2 + b * v**2 + tilt * u * v

    else:
        low, high, small, large = np.exp(rng.normal(np.log([0.004, 0.012, 0.006, 0.006]), 0.5))
        follow = rng.uniform(0, 1)  # the best rate goes with this power of the batch

        def valley(u: np.ndarray, v: np.ndarray) -> np.ndarray:
            along = u - follow * v
            steep = np.where(along > 1.2, 0.5 * (along - 1.2) ** 2, 0)
            rate = np.where(along > 0, high, low) * along**2
            return rate + steep + np.where(v > 0, large, small) * v**2

    return PlantedStudy(
        cells=cells,
        exponents=exponents,
        optima={cell.name: optimum for cell, optimum in zip(cells, optima, strict=True)},
        lowest={c.name: 1.7 + 320 / c.params**0.34 + 400 / c.tokens**0.28 for c in cells},
        valley=valley,
        noise=noise,
        seed=seed,
    )


def search(study: PlantedStudy, trials: int = 4, first: int = 10) -> Surface:
    """Search every cell in order with the ladder; the fitted surface."""
    rng = np.random.default_rng(study.seed)
    ladder = Ladder()
    space = search_space(LEARNING_RATES, LOG2_BATCHES)
    for position, cell in enumerate(study.cells):
        budget = first if position == 0 else trials
        sampler = make_sampler(
            "ladder",
            cell=cell,
            ladder=ladder,
            learning_rate=LEARNING_RATES,
            log2_batch=LOG2_BATCHES,
            sequence_length=SEQUENCE,
            trials=budget,
            seed=study.seed,
        )
        searched = optuna.create_study(sampler=sampler)
        ladder.register(cell, searched, sequence_length=SEQUENCE)
        for _ in range(budget):
            trial = searched.ask(space)
            batch = SEQUENCE * 2.0 ** trial.params[LOG2_BATCH]
            gap = study.gap(cell, trial.params[LEARNING_RATE], batch)
            if gap > _DIVERGES:
                trial.set_user_attr("status", "diverged")
                searched.tell(trial, state=TrialState.FAIL)
            else:
                luck = study.noise * rng.standard_normal()
                searched.tell(trial, study.lowest[cell.name] * np.exp(gap + luck))
    return ladder.surface()


def covered(study: PlantedStudy, surface: Surface) -> bool:
    """Whether the 95 % interval of every exponent holds the true one."""
    intervals = {key: surface.laws.exponent(*key) for key in study.exponents}
    return all(
        intervals[key][1] <= true <= intervals[key][2] for key, true in study.exponents.items()
    )


def recommended_gaps(study: PlantedStudy, surface: Surface) -> np.ndarray:
    """[cells], true gaps of the recommendations, in per cent."""
    return 100 * np.array([study.gap(cell, *surface.recommend(cell)) for cell in study.cells])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.planted", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--noise", type=float, default=0.001, help="sd of ln loss")
    parser.add_argument("--scatter", type=float, default=0.05, help="of optima about the laws")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for shape in SHAPES:
        studies = [plant(i, shape, options.noise, options.scatter) for i in range(options.studies)]
        surfaces = [search(study, options.trials) for study in studies]
        held = sum(map(covered, studies, surfaces))
        gaps = np.concatenate(list(map(recommended_gaps, studies, surfaces)))
        print(
            f"{shape}: all exponents in their 95 % intervals in {held} of {len(studies)} studies;"
            f" recommended gap mean {gaps.mean():.3f} %, 90th percentile"
            f" {np.quantile(gaps, 0.9):.3f} %, max {gaps.max():.3f} %"
        )


if __name__ == "__main__":
    main()
