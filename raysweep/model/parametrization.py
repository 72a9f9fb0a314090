"""How initial weights, learning rates and Adam's eps follow a model's width and depth.

muP (Yang et al. 2022, arXiv 2203.03466, table 8) and CompleteP (Dey et al. 2025, arXiv 2505.01618,
table 1, alpha = 1) at w times the base's width and d times its depth:

                  initial sd             learning rate              eps
    embedding     base                   1                          1 / w
    hidden        base / sqrt w          1 / w, Muon 1 / sqrt w     1 / (w d)
    head, router  base, times 1 / w      1, times 1 / w             1 / w; router 1 / (w d)
    gains         one                    1                          1 / (w d); the last 1 / w
    blocks        output times 1 / d

The papers multiply logits by 1 / w and blocks by 1 / d. Under Adam and Muon, whose steps do not
depend on the gradient's size, a multiplier m of an output is the same as m times the initial sd and
m times the learning rate of the matrix that writes it, with eps / m: so it is done here, and the
model computes as it always does. Of Muon, orthogonal updates have every singular value alike: of
entries of a given size they are sqrt w times as large in spectral norm as those of rank one, hence
1 / sqrt w.

Weight decay is left as it is: what a step shrinks a weight by does not depend on the shape (as in
CompleteP, whose decay grows as its rate falls). The router is an output: its number of experts does
not grow with the width. muP has d = 1 throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raysweep.study.shape import ModelShape
from raysweep.study.trials import Recipe, Role

RESIDUAL = (".out", "down")
"""How names end of matrices that write to the residual stream."""


def role_of(name: str, ndim: int) -> Role:
    """What a parameter of a decoder is for, by its name and number of dimensions."""
    if name in ("embedding", "head"):
        return name
    if ndim == 1:
        return "norms"
    return "router" if name.endswith("router.weight") else "matrices"


@dataclass(frozen=True)
class Parametrization:
    """Of one shape. Factors are relative to the base shape, at which all parametrizations agree."""

    shape: ModelShape
    init_std: float | None = None
    width: float = 1.0
    """d_model over the base's; 1 in the standard parametrization."""
    depth: float = 1.0
    """Layers over the base's; 1 but in CompleteP."""

    @classmethod
    def of(cls, recipe: Recipe, shape: ModelShape) -> Parametrization:
        """That of a recipe."""
        width = depth = 1.0
        if recipe.parametrization != "standard":
            assert recipe.base_d_model is not None
            width = shape.d_model / recipe.base_d_model
        if recipe.parametrization == "completep":
            assert recipe.base_layers is not None
            depth = shape.layers / recipe.base_layers
        return cls(shape, recipe.init_std, width, depth)

    def std(self, name: str, fan_in: int) -> float:
        """Standard deviation of initial weights.

        In the standard parametrization `init_std`, or 1/sqrt(fan-in) of each matrix. Projections
        that write to the residual stream are scaled down by 1/sqrt(2 layers) (GPT-2), in CompleteP
        of the base. An untied embedding has standard deviation 1 (its fan-in is one token), a tied
        one 1/sqrt(d_model), for the head's sake.
        """
        role = role_of(name, 2)
        if role == "embedding":
            fan_in = self.shape.d_model if self.shape.tie_embeddings else 1
        std = self.init_std if self.init_std is not None else 1 / math.sqrt(fan_in)
        if role == "matrices" and self.init_std is not None:
            std /= math.sqrt(self.width)
        if role in ("head", "router"):  # 1/sqrt(fan-in) has fallen by sqrt(width) by itself
            std /= self.width if self.init_std is not None else math.sqrt(self.width)
        if name.endswith(RESIDUAL):
            std /= math.sqrt(2 * self.shape.layers / self.depth) * self.depth
        return std

    def rate(self, name: str, role: Role, *, muon: bool = False) -> float:
        """Learning rate over the base's."""
        if role in ("embedding", "norms"):
            return 1.0
        rate = 1 / (math.sqrt(self.width) if muon else self.width)
        return rate / self.depth if name.endswith(RESIDUAL) else rate

    def eps(self, name: str, role: Role) -> float:
        """Adam's eps over the base's: as the parameter's gradient."""
        width = 1.0 if role in ("head", "router") else self.width
        in_block = role not in ("embedding", "head") and name != "norm"
        depth = self.depth if in_block and not name.endswith(RESIDUAL) else 1.0
        return 1 / (width * depth)
