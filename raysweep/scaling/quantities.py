"""The quantities of a study, each once: name, unit, symbol, and how its numbers are written."""

from __future__ import annotations

from dataclasses import dataclass

from raysweep.text import written


@dataclass(frozen=True)
class Quantity:
    """What a column of cells is called and how it is shown."""

    name: str
    """In a sentence: `learning rate`."""
    style: str
    """Of `raysweep.text.STYLES`."""
    unit: str = ""
    symbol: str = ""
    """What stands for it where everybody knows the letter."""

    def write(self, value: float | None) -> str:
        """A value with the digits that it deserves, without its unit."""
        return written(value, self.style)

    @property
    def label(self) -> str:
        """Over a column: `D`, `learning rate`."""
        return self.symbol or self.name

    @property
    def axis(self) -> str:
        """Along an axis: `D, tokens`, `learning rate`, `loss, nats a token`."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def ratio_style(self) -> str:
        """How ratios of it are written: losses differ by little."""
        return "loss" if self.style == "loss" else "ratio"


QUANTITIES = {
    "learning_rate": Quantity("learning rate", "rate"),
    "batch_tokens": Quantity("batch", "batch", "tokens"),
    "loss": Quantity("loss", "loss", "nats a token"),
    "params_active_non_embedding": Quantity("parameters", "params", "active parameters", "N"),
    "flops": Quantity("FLOPs", "flops", "training FLOPs", "C"),
    "tokens": Quantity("tokens", "tokens", "tokens", "D"),
    "noise_scale_tokens": Quantity("gradient noise scale", "tokens", "tokens"),
}
"""By column, in the order in which they are told."""

TARGETS = ("learning_rate", "batch_tokens")
"""What each cell has an optimum of."""

ANSWERS = (*TARGETS, "loss")
"""What is told of every run."""

EXPONENTS = {"params": "N", "tokens": "D", "sparsity": "total/active"}
"""What the laws of the optimum are powers of: name in a law -> symbol."""
