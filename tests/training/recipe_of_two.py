"""Recipes of test_recipes.py, and what each of two workers runs of them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import toys

from raysweep.results.filesystem import Storage
from raysweep.study import TrialSpec
from raysweep.training.loop import train
from raysweep.training.outcome import Silent, TrialOutcome
from raysweep.training.parallel import Workers


class TwoSets(toys.ToyCorpus):
    """The toy, and a second validation set: its tokens in another order."""

    def named_validation(self, name: str) -> np.ndarray:
        assert name == "turned"
        return self.validation[::-1].copy()


RECIPES: dict[str, dict[str, Any]] = {
    "muon": {
        "architecture": "dense",
        "scale": {"kv_heads": 1, "d_model": 24, "heads": 2},  # shards of unequal rows
        "recipe": {
            "optimizer": "muon",
            "weight_decay_rule": "timescale",
            "ema_tokens": 500,
            "group_rates": {"embedding": 2.0},
            "schedule": "linear",
            "final_lr_fraction": 0.0,
        },
    },
    "completep": {
        "architecture": "moe",
        "moe": {
            "experts": 4,
            "top_k": 2,
            "shared_experts": 1,
            "first_dense": 1,
            "scores": "sigmoid",
            "balance": "bias",
            "route_scale": 2.5,
        },
        "scale": {"layers": 3},
        "recipe": {
            "optimizer": "muon",
            "parametrization": "completep",
            "base_d_model": 8,
            "base_layers": 1,
            "weight_decay_rule": "independent",
            "weight_decay": 1e-3,
            "schedule": "wsd",
            "decay_shape": "1-sqrt",
            "ema_tokens": 500,
        },
    },
}


def trial_of(name: str) -> TrialSpec:
    changes = {**RECIPES[name]}
    recipe = {"checkpoint_seconds": 1e-9, **changes.pop("recipe")}
    spec = toys.make_spec(tokens=16 * 8 * 12, recipe=recipe, **changes)
    return dataclasses.replace(spec, validation_sets=("plain", "turned"))


class Killed(Silent):
    def report(self, step: int, tokens: int, loss: float) -> None:
        if step == 7:
            raise KeyboardInterrupt


def task(rank: int, world_size: int, folder: Path) -> dict[Any, TrialOutcome]:
    corpus, outcomes = TwoSets(), {}
    for strategy in ("ddp", "fsdp"):
        workers = Workers.of_process_group(strategy)
        for name in RECIPES:
            trial = trial_of(name)
            outcomes[strategy, name] = train(trial, corpus, workers=workers)
            if strategy == "ddp":
                continue
            options = {"workers": workers, "checkpoints": Storage.at(folder / f"{strategy}-{name}")}
            try:
                train(trial, corpus, reporter=Killed(), **options)
            except KeyboardInterrupt:
                dist.barrier()
            outcomes[strategy, name, "resumed"] = train(trial, corpus, **options)
    return outcomes
