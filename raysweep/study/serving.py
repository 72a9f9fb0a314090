"""Keys of the search-space file that say how the models would be served, and at what price."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raysweep.study.fields import Count, Name, Positive, Section

GpuName = Literal["v100-32gb", "a100-40gb", "a100-80gb", "l4", "l40s", "h100", "h200", "b200"]
"""Keys of `raysweep.scaling.compute.roofline.GPUS`."""


class ServingSettings(Section):
    """Machines, traffic and budgets of `raysweep serving` and of the report."""

    gpu: GpuName = "h100"
    dollars: Positive = 1.0
    """Of one GPU an hour; 1 makes costs GPU-hours."""
    prompt: Positive = 161
    """Tokens that a request brings: those of ShareGPT (arXiv 2309.06180, fig. 11)."""
    generated: Positive = 338
    """Tokens that it gets, likewise."""
    max_sequences: Positive = 256
    """Sequences that a server holds at once: vLLM's default."""
    gpus: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Numbers of GPUs that may share one model."""
    budgets: tuple[Positive, ...] = ()
    """Training FLOPs to spend; default: those of the largest run asked about."""
    reference: Name | Annotated[int, Field(ge=1)] | None = None
    """The architecture, or its number of experts, that others are held against; default: the fewest
    experts of a mixture."""
