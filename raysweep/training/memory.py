"""How many sequences a worker puts through the model at once: by choice, then by what fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from raysweep.model import Decoder
from raysweep.model.transformer import Experts
from raysweep.study.shape import ModelShape
from raysweep.study.spec import TrialSpec
from raysweep.training import runtime

CPU_MICRO_TOKENS = 2048
"""More tokens at once than this are no faster on a CPU: activations leave its cache."""
GPU_MICRO_TOKENS = 32768
"""A GPU takes so many at once where the batch has them. With half of it, an H100 waited for its
kernels to be launched 25 % of the time at 20M parameters, 7 % at 125M, 15 % in a MoE at 125M."""
GPU_LEAST_TOKENS = 8192
"""Fewer tokens at once leave a GPU waiting so long that to compute activations twice is better."""


@dataclass(frozen=True)
class Fit:
    """What a worker does at once."""

    micro: int
    """Sequences; 0 where not even one fits."""
    recompute: bool
    """Whether activations are computed again for the backward pass."""


def wanted_micro_batch(
    spec: TrialSpec, device: torch.device, world_size: int, *, compiled: bool
) -> int:
    """Sequences at once, if there is memory for them.

    Where blocks are compiled, two micro-batches a step are left for the noise scale, and trials of
    a cell take the same, so that they share one graph: on a GPU all whose batches have the tokens
    for it, on CPUs, which are never starved, all.
    """
    local, length = spec.batch_sequences // world_size, spec.cell.shape.sequence_length
    limit: float | None = spec.cell.resources.micro_batch_sequences
    on_cpu = device.type == "cpu"
    if limit is None:
        limit = (CPU_MICRO_TOKENS if on_cpu else GPU_MICRO_TOKENS) // length
    parts = 2 if compiled and spec.recipe.noise_scale else 1
    own = max(1, local // parts)
    if compiled and on_cpu:
        least = min(spec.least_batch_sequences or math.inf, spec.batch_sequences)
        limit = min(limit, max(1, least // world_size // parts))
    micro = min(runtime.floor_power_of_two(limit), own)
    while local % micro:
        micro -= 1
    return micro


def guess(shape: ModelShape, free_bytes: float) -> int:
    """Sequences whose activations about fill the memory: more than this is not tried."""
    return int(2 * free_bytes / (activation_bytes(shape) * shape.sequence_length))


def free_bytes(device: torch.device, share: float) -> float:
    """What a GPU has left for this process, of its share of the card."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    own = min(share, 1.0) * total - torch.cuda.memory_allocated(device) if share else total
    return min(free, own)


def fit(
    wanted: int, length: int, attempt: Callable[[int, bool], bool], agree: Callable[[int], int]
) -> Fit:
    """The largest micro-batch, halving from what is wanted, that all workers have memory for.

    Where few tokens fit, activations are computed twice if more fit then.

    Args:
        attempt: tries one forward and backward pass of so many sequences, with activations kept
            (False) or computed again (True); whether there was memory.
        agree: the smallest of the workers' numbers. All workers must make the same calls.
    """

    def largest(recompute: bool) -> int:
        micro = wanted
        while micro and not agree(int(attempt(micro, recompute))):
            micro //= 2
        return micro

    kept = largest(False)
    if kept == wanted or kept * length >= GPU_LEAST_TOKENS:
        return Fit(kept, False)
    recomputed = largest(True)
    return Fit(recomputed, True) if recomputed > kept else Fit(kept, False)


def passes(model: Decoder, sequences: int, reserve_bytes: float, device: torch.device) -> bool:
    """Whether there is memory for a forward and backward pass of so many sequences, beside so much
    that is needed besides. Gradients are left as they come."""
    tokens = torch.zeros(sequences, model.shape.sequence_length, dtype=torch.int64, device=device)
    try:
        reserve = torch.empty(int(reserve_bytes), dtype=torch.uint8, device=device)
        model(tokens, tokens).objective.backward()
        del reserve
        runtime.wait_for(device)
        return True
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
    return False


def stand_in(model: Decoder, device: torch.device) -> tuple[Decoder, float]:
    """A model that takes the memory which a sharded one takes on this worker, and needs no other
    workers: layers of a kind share one set of weights, as only one is gathered at a time. And the
    bytes that it lacks: the next block, gathered ahead, and a gradient on its way in float32."""
    with torch.device("meta"):
        twin = Decoder(model.shape, model.settings, rope_base=model.rope_base, z_loss=model.z_loss)
    twin.dtype, twin.compiled = model.dtype, model.compiled
    first: dict[type[nn.Module], nn.Module] = {}
    for blocks in (twin.attention, twin.feed_forward):
        for index, block in enumerate(blocks):
            blocks[index] = first.setdefault(type(block), block)
    twin.to_empty(device=device)
    twin.reset_buffers()
    exact = {id(b.router.weight) for b in first.values() if isinstance(b, Experts)}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_(std=0.02)
            if model.dtype is not None and id(parameter) not in exact:
                parameter.data = parameter.data.to(model.dtype)
    largest = max(sum(p.numel() for p in block.parameters()) for block in first.values())
    return twin, 8.0 * largest


def activation_bytes(shape: ModelShape) -> float:
    """Bytes of activations a token needs while training in mixed precision, roughly.

    Per layer: two bfloat16 copies of what attention and the feed-forward read and write, the
    residual stream; and the logits with their gradient in float32.
    """
    width = shape.d_ff
    if shape.is_moe:
        width = max(width, (shape.top_k + shape.shared_experts) * shape.expert_ff + shape.d_model)
    layer = 2 * 2 * (6 * shape.d_model + 4 * width) + 2 * 2 * shape.d_model
    return shape.layers * layer + 10 * shape.vocab_size
