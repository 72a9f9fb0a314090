"""Planted studies for the tests of fits: optima, valleys and losses by known laws, plus noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.cells import CellTrials
from raysweep.study.shape import RunSize


def valley(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """ln(loss / least loss) at (ln lr, ln batch) off the optimum: steeper towards large steps."""
    steep = 0.02 * (np.expm1(u) - u) + 0.01 * (np.expm1(-u) + u)
    return steep + 0.015 * v**2 - 0.006 * u * v


def make_trials(
    *,
    optimum: tuple[float, float] = (3e-3, 2e5),
    least: float = 2.5,
    noise: float = 0.0,
    n: int = 40,
    reach: float = 1.5,
    off: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
    grid: bool = False,
) -> CellTrials:
    """One cell's trials, random or on a 7 x 7 grid, centred `off` (ln units) from the optimum."""
    rng = np.random.default_rng(seed)
    if grid:
        steps = np.linspace(-reach, reach, 7)
        u, v = (a.ravel() for a in np.meshgrid(steps, steps))
    else:
        u, v = rng.uniform(-reach, reach, (2, n))
    u, v = u + off[0], v + off[1]
    loss = least * np.exp(valley(u, v) + noise * rng.standard_normal(len(u)))
    return CellTrials(
        size=RunSize(1e8, 2e9, name="cell"),
        learning_rate=optimum[0] * np.exp(u),
        batch_tokens=optimum[1] * np.exp(v),
        loss=loss,
        failed_learning_rate=np.empty(0),
        failed_batch_tokens=np.empty(0),
    )


def make_study(
    *,
    scales: Sequence[float] = (1e7, 3e7, 9e7, 2.7e8),
    tokens_per_param: Sequence[float] = (10, 40),
    kinds: Sequence[str] = ("dense",),
    per_cell: int = 12,
    noise: float = 0.001,
    scatter: float = 0.0,
    moe_rate: float = 1.0,
    moe_batch: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """A results table by planted laws.

    lr* = 3e-3 (N/1e8)^-0.6 (D/2e9)^0.25 moe_rate, B* = 2e5 (D/2e9)^0.5 moe_batch (N active
    non-embedding), loss = 1.7 + 480/(N E^0.5)^0.35 + 2000/D^0.37. MoE cells have 8 experts, top-2,
    and experts in two thirds of N.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for kind in kinds:
        experts, top_k = (8, 2) if kind == "moe" else (1, 1)
        for params in scales:
            for ratio in tokens_per_param:
                tokens = params * ratio
                rate = 3e-3 * (params / 1e8) ** -0.6 * (tokens / 2e9) ** 0.25
                batch = 2e5 * (tokens / 2e9) ** 0.5
                if kind == "moe":
                    rate, batch = rate * moe_rate, batch * moe_batch
                rate, batch = np.exp(np.log([rate, batch]) + scatter * rng.standard_normal(2))
                least = 1.7 + 480 / (params * experts**0.5) ** 0.35 + 2000 / tokens**0.37
                u, v = rng.uniform(-1.5, 1.5, (2, per_cell))
                loss = least * np.exp(valley(u, v) + noise * rng.standard_normal(per_cell))
                total = params * (1 / 3 + 2 / 3 * experts / top_k)
                rows.append(
                    pd.DataFrame(
                        {
                            "study": "planted",
                            "cell": f"{kind}-{params:g}-{ratio:g}tpp",
                            "architecture": kind,
                            "architecture_kind": kind,
                            "scale": f"{params:g}",
                            "experts": experts,
                            "top_k": top_k,
                            "params_active_non_embedding": params,
                            "params_total_non_embedding": total,
                            "params_active": params + 3e5 * (params / 1e7) ** (1 / 3),
                            "params_total": total + 3e5 * (params / 1e7) ** (1 / 3),
                            "params_dense": params,
                            "flops_per_token": 7 * params,
                            "sequence_length": 1024,
                            "tokens": tokens,
                            "learning_rate": rate * np.exp(u),
                            "batch_tokens": batch * np.exp(v),
                            "status": "finished",
                            "loss": loss,
                            "noise_scale_tokens": 1.5 * batch * np.exp(0.1 * rng.standard_normal()),
                        }
                    )
                )
    return pd.concat(rows, ignore_index=True)


@pytest.fixture(scope="session")
def cell_trials() -> Callable[..., CellTrials]:
    """`make_trials`: one planted cell."""
    return make_trials


@pytest.fixture(scope="session")
def planted_study() -> Callable[..., pd.DataFrame]:
    """`make_study`: a planted results table."""
    return make_study
