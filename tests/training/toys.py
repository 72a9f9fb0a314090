"""A small synthetic corpus and trials on it, for tests and for the processes that they start."""

from typing import Any

import numpy as np

from raysweep.study import Study, TrialSpec


class ToyCorpus:
    """Byte-like tokens with structure: each follows from the one before, with some noise.

    What a trial needs of `raysweep.data.corpus.Corpus`; cheap to pickle.
    """

    bytes_per_token = 1.0
    hash = "toy"
    vocab_size = 32
    train_tokens = 40_000

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        step = rng.permutation(self.vocab_size)
        tokens = np.empty(self.train_tokens + 4000, dtype=np.uint16)
        token = 0
        for i, noisy in enumerate(rng.random(len(tokens)) < 0.3):
            token = int(rng.integers(self.vocab_size)) if noisy else int(step[token])
            tokens[i] = token
        self.train, self.validation = tokens[: self.train_tokens], tokens[self.train_tokens :]


def make_spec(architecture: str = "dense", **changes: Any) -> TrialSpec:
    """A trial of a tiny model; `changes` go to the trial, its recipe or its resources."""
    recipe = {"warmup_fraction": 0.1, "weight_decay": 0.1, **changes.pop("recipe", {})}
    study = Study.from_dict(
        {
            "study": "toy",
            "architectures": {
                "dense": {},
                "moe": {"experts": 4, "top_k": 2, **changes.pop("moe", {})},
            },
            "model": {"sequence_length": 16},
            "scales": [{"d_model": 16, "layers": 2, "heads": 2, **changes.pop("scale", {})}],
            "horizons": [{"tokens": changes.pop("tokens", 16 * 8 * 40)}],
            "data": {
                "source": "tokens",
                "vocab_size": 32,
                "paths": ["unused.bin"],
                "validation_sequences": 33,
            },
            "recipe": recipe,
            "search": {"batch_sequences": {"low": 4}},
            "resources": changes.pop("resources", {}),
        }
    )
    cell = next(c for c in study.cells if c.architecture == architecture)
    given = {"data_hash": "toy", "learning_rate": 0.01, "batch_sequences": 8, "seed": 0}
    return study.trial(cell, **{**given, **changes})
