"""Dense and mixture-of-experts decoders. `build` makes one from a shape."""

from __future__ import annotations

import torch

from raysweep.model.initial import initialise
from raysweep.model.parametrization import Parametrization
from raysweep.model.transformer import Decoder, Losses, RouterStats
from raysweep.study.cells import Architecture
from raysweep.study.shape import ModelShape

__all__ = ["Decoder", "Losses", "Parametrization", "RouterStats", "build", "initialise"]


def build(
    shape: ModelShape,
    settings: Architecture,
    *,
    rope_base: float,
    parametrization: Parametrization | None = None,
    z_loss: float = 0.0,
    seed: int,
    device: torch.device | str = "cpu",
    threads: int = 1,
) -> Decoder:
    """A decoder with weights drawn from `seed` alone; `study.shape.count` counts it exactly.

    `settings` gives how routing is balanced, `z_loss` the weight of the output z-loss;
    `parametrization`, by default the standard one, how wide weights are drawn. They are made on the
    device, with so many threads.
    """
    with torch.device(device):
        model = Decoder(shape, settings, rope_base=rope_base, z_loss=z_loss)
    model.reset_buffers()
    initialise(model, parametrization or Parametrization(shape), seed=seed, threads=threads)
    return model
