"""Dense and mixture-of-experts decoders. `build` makes one from a shape."""

from __future__ import annotations

from raysweep.model.transformer import Decoder, Losses, RouterStats, initialise
from raysweep.study.cells import Architecture
from raysweep.study.shape import ModelShape

__all__ = ["Decoder", "Losses", "RouterStats", "build"]


def build(
    shape: ModelShape,
    settings: Architecture,
    *,
    rope_base: float,
    init_std: float | None = None,
    z_loss: float = 0.0,
    seed: int,
) -> Decoder:
    """A decoder with weights drawn from `seed` alone; `scale.count(shape)` counts it exactly.

    `settings` gives how routing is balanced, `z_loss` the weight of the output z-loss.
    """
    model = Decoder(shape, settings, rope_base=rope_base, z_loss=z_loss)
    initialise(model, init_std=init_std, seed=seed)
    return model
