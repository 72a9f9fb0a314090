"""One of two workers of a process group, started as a script by test_recipes.py."""

import dataclasses
import importlib.util
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysweep.results.filesystem import Storage
from raysweep.study import TrialSpec
from raysweep.training.loop import train
from raysweep.training.outcome import Silent
from raysweep.training.parallel import Workers


def load_toys() -> Any:
    conftest = importlib.util.spec_from_file_location(
        "toys", Path(__file__).with_name("conftest.py")
    )
    assert conftest is not None
    assert conftest.loader is not None
    toys = importlib.util.module_from_spec(conftest)
    conftest.loader.exec_module(toys)
    return toys


toys = load_toys()


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
    spec = toys.make_spec(tokens=16 * 8 * 20, recipe=recipe, **changes)
    return dataclasses.replace(spec, validation_sets=("plain", "turned"))


class Killed(Silent):
    def report(self, step: int, tokens: int, loss: float) -> None:
        if step == 11:
            raise KeyboardInterrupt


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
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
    with (folder / f"outcomes{rank}").open("wb") as file:
        pickle.dump(outcomes, file)
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # as in one_of_two.py


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
