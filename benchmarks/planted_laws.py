"""Planted truths of the loss laws: coefficients near published ones, and cells to fit them on."""

from __future__ import annotations

import numpy as np

from raysweep.scaling.loss.laws import LOSS_LAWS

# What the sources publish, and plausible values where they publish none.
PLANTED: dict[str, dict[str, float]] = {
    "kaplan": {"E0": 1.7, "A": 90.0, "a": 0.12},
    "wang": {"A": 420.0, "B": 1700.0, "s": 1.8, "a": 0.34, "b": 0.35, "g": 0.13},
    "yun": {
        "A": 420.0,
        "B": 0.3,
        "C": 1700.0,
        "F": 1.5,
        "a": 0.34,
        "b": 0.5,
        "g": 0.35,
        "d": -0.0015,
        "E_start": 1.8,
        "E_max": 300.0,
    },
    "sparsity": {
        "a": 16612.5,
        "b": 5455.7,
        "c": 0.46,
        "d": 17.26,
        "e": 0.94,
        "al": 0.5962,
        "be": 0.3954,
        "lam": -0.1666,
        "del": 0.1603,
        "gam": 0.1595,
    },
    "three_term": {"E0": 1.6, "A": 300.0, "B": 40.0, "C": 12.0, "a": 0.33, "b": 0.4, "g": 0.5},
    **{key: dict(law.published) for key, law in LOSS_LAWS.items() if law.published},
}


def simulated_cells(key: str, n: int = 120, seed: int = 0) -> dict[str, np.ndarray]:
    """The inputs of law `key` at `n` cells spread over two decades of size and of tokens."""
    rng = np.random.default_rng(seed)
    params = np.exp(rng.uniform(np.log(3e7), np.log(7e9), n))
    tokens = np.exp(rng.uniform(np.log(5e8), np.log(2e11), n))
    experts = 2.0 ** rng.integers(0, 9, n)
    every = {
        "params": params,
        "tokens": tokens,
        "flops": 6 * params * tokens,
        "experts": experts,
        "sparsity": 1 - 1 / experts,
        "granularity": 2.0 ** rng.integers(0, 6, n),
        "batch_tokens": 2.0 ** rng.integers(15, 23, n),
        "steps": np.exp(rng.uniform(np.log(1e3), np.log(2e5), n)),
    }
    return {name: every[name] for name in LOSS_LAWS[key].inputs}
