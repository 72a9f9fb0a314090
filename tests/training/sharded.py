"""One of several workers that share a model, started as a script by test_sharded.py: what FSDP
gathers and keeps, and what a trial comes to."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toys
from workers import work

from raysweep.training.learner import Learner
from raysweep.training.loop import train
from raysweep.training.outcome import TrialOutcome
from raysweep.training.parallel import Workers


def traffic(learner: Learner) -> dict[str, Any]:
    """Of a step's one micro-batch: bytes a parameter that are gathered before and after the forward
    pass and reduced, by dtype; and of weights, those kept between the two passes."""
    gathered: list[tuple[str, int]] = []
    reduced: list[tuple[str, int]] = []

    def spy(real, seen: list[tuple[str, int]], index: int, name: str):
        def call(*args, **kwargs):
            tensor = args[index] if len(args) > index else kwargs[name]
            seen.append((str(tensor.dtype).removeprefix("torch."), tensor.nbytes))
            return real(*args, **kwargs)

        return call

    names = ("all_gather_single", 0, "output_tensor"), ("reduce_scatter_single", 1, "input")
    real = [getattr(dist, name) for name, _, _ in names]
    for (name, index, argument), call, seen in zip(names, real, (gathered, reduced), strict=True):
        setattr(dist, name, spy(call, seen, index, argument))
    model, kept = learner.model, {}

    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.randint(0, 32, (1, 16))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, tokens)
    # By their shapes; what FSDP has let go of has no bytes left.
    shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim > 1}
    sizes = [
        t.untyped_storage().nbytes() for t in kept.values() if tuple(sorted(t.shape)) in shapes
    ]
    before = list(gathered)
    loss.objective.backward()
    for (name, _, _), call in zip(names, real, strict=True):
        setattr(dist, name, call)
    count = sum(p.numel() for p in model.parameters())

    def each(seen: list[tuple[str, int]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for dtype, size in seen:
            found[dtype] = found.get(dtype, 0.0) + size / count
        return found

    return {
        "kept": sum(sizes) / count,
        "forward": each(before),
        "backward": each(gathered[len(before) :]),
        "reduced": each(reduced),
    }


def task(rank: int, world_size: int, folder: Path) -> dict[Any, TrialOutcome | dict[str, Any]]:
    corpus = toys.ToyCorpus()
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    outcomes: dict[Any, TrialOutcome | dict[str, Any]] = {}
    strategy = "fsdp" if world_size == 2 else "hsdp"
    workers = Workers.of_process_group(strategy)
    assert workers.replicas == world_size // 2
    for architecture in ("dense", "moe"):
        for precision in ("float32", "bfloat16"):
            trial = toys.make_spec(
                architecture, tokens=16 * 8 * 12, recipe={"precision": precision}
            )
            outcomes[architecture, precision] = train(trial, corpus, workers=workers)
        big = toys.make_spec(
            architecture,
            moe={"experts": 16, "top_k": 2, "shared_experts": 1, "balance": "bias"},
            scale={"d_model": 128, "layers": 4, "heads": 2},
            recipe={"precision": "bfloat16"},
        )
        learner = Learner(big, corpus, torch.device("cpu"), workers)
        learner.build()
        outcomes[architecture, "traffic"] = traffic(learner)
    return outcomes


if __name__ == "__main__":
    work(task)
