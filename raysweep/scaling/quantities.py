"""The quantities of a study, each once: key, name, symbol, unit, axis, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass

from raysweep.text import written


@dataclass(frozen=True)
class Quantity:
    """What a column of cells or a law's input or target is called and how it is shown."""

    key: str
    """The column's name."""
    name: str
    """In a sentence: `learning rate`."""
    symbol: str
    """In a formula."""
    style: str
    """Of `raysweep.text.STYLES`."""
    unit: str = ""
    meaning: str = ""
    """What the symbol stands for, where the name does not say it all."""
    log: bool = True
    """Whether axes of it are logarithmic."""
    searched: bool = False
    """Whether cells have an optimum of it, which is then what a law gives."""

    def write(self, value: float | None) -> str:
        """A value with the digits that it deserves, without its unit."""
        return written(value, self.style)

    @property
    def optimal(self) -> str:
        """`optimal learning rate`; the name alone of what is not searched."""
        return f"optimal {self.name}" if self.searched else self.name

    @property
    def star(self) -> str:
        """`lr*`, where room is short."""
        return f"{self.symbol}*" if self.searched else self.symbol

    @property
    def axis(self) -> str:
        """The label of an axis: `D, tokens`, `optimal batch, tokens`, `loss, nats a token`."""
        if self.unit and self.unit in self.name:
            return f"{self.symbol}, {self.name}"
        return f"{self.optimal}, {self.unit}" if self.unit else self.optimal


_ALL = (
    Quantity("learning_rate", "learning rate", "lr", "rate", searched=True),
    Quantity("batch_tokens", "batch", "batch", "batch", "tokens", searched=True),
    Quantity("noise_scale_tokens", "gradient noise scale", "B", "batch", "tokens"),
    Quantity("loss", "loss", "L", "loss", "nats a token", "nats a token"),
    Quantity("params_active_non_embedding", "active parameters", "N", "params", "parameters"),
    Quantity("params", "parameters", "N", "params", "parameters"),
    Quantity("tokens", "tokens", "D", "tokens", "tokens"),
    Quantity("flops", "training FLOPs", "C", "flops", "FLOPs"),
    Quantity(
        "experts", "experts", "E", "number", "", "routed experts a MoE layer, 1 is dense", log=False
    ),
    Quantity("top_k", "top-k", "K", "number", "", "routed experts a token", log=False),
    Quantity(
        "active_ratio",
        "active ratio",
        "R",
        "ratio",
        meaning="active over total non-embedding parameters, 1 is dense",
    ),
    Quantity(
        "moe", "MoE", "M", "number", "", "e for MoE, 1 for dense: its exponent is the log of the "
        "ratio", log=False,
    ),
)  # fmt: skip

QUANTITIES: dict[str, Quantity] = {quantity.key: quantity for quantity in _ALL}
"""By key."""

SEARCHED: tuple[str, ...] = tuple(q.key for q in _ALL if q.searched)
"""Keys of what each cell has an optimum of, and a recommendation is of."""

MEASURED: tuple[str, ...] = (*SEARCHED, "noise_scale_tokens")
"""Keys of what is set against the loss, and compared between architectures."""
