"""A recommendation: learning rate, batch and expected loss of a run that was never made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raysweep.display import InNotebooks
from raysweep.scaling.plain import plain
from raysweep.text import estimated, short, written


@dataclass(frozen=True, eq=False)
class Recommendation(InNotebooks):
    """What to run, how sure that is, and what it rests on.

    Intervals are 95 %, (nan, nan) where the cells are too few for one. `batch_tokens` is rounded to
    4, 5, 6 or 7 times a power of two sequences; `batch_tokens_exact` is what the law says.
    `extrapolation` is the factor by which the run lies beyond the cells behind the laws (below 1:
    beneath them; 1: inside). `by_method` holds (learning rate, batch tokens) as each way of
    reading optima would have it.
    """

    architecture: str
    params: float
    tokens: float
    experts: int
    top_k: int
    learning_rate: float
    learning_rate_interval: tuple[float, float]
    batch_tokens: float
    batch_tokens_exact: float
    batch_tokens_interval: tuple[float, float]
    batch_sequences: int | None
    sequence_length: int | None
    loss: float
    loss_interval: tuple[float, float]
    laws: dict[str, str]
    extrapolation: dict[str, float]
    rests_on: tuple[str, ...]
    by_method: dict[str, tuple[float, float]]
    published: tuple[dict[str, object], ...]
    warnings: tuple[str, ...]
    status: str

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        model = f"{short(self.params)} active non-embedding parameters"
        if self.experts > 1:
            model += f", {self.experts} experts, top-{self.top_k}"
        sequences = f" ({self.batch_sequences} sequences of {self.sequence_length})"
        rate = estimated(self.learning_rate, *self.learning_rate_interval, style="rate")
        batch = estimated(
            self.batch_tokens, *self.batch_tokens_interval, style="batch", unit="tokens"
        )
        loss = estimated(self.loss, *self.loss_interval, style="loss")
        lines = [
            f"{self.architecture}: {model}, {short(self.tokens)} tokens",
            f"  learning rate  {rate}",
            f"  batch          {batch}{sequences if self.batch_sequences else ''}",
            f"  expected loss  {loss}",
        ]
        factors = ", ".join(f"{v:.3g}x in {k}" for k, v in self.extrapolation.items())
        lines.append(f"  extrapolates   {factors or 'unknown'}")
        lines += [f"  rests on       {line}" for line in self.rests_on]
        for name, pair in self.by_method.items():
            lines.append(f"  by {name:<12}{_pair(*pair)}")
        for answer in self.published:
            lines.append(f"  {_published(answer)}")
        lines += [f"  warning        {w}" for w in self.warnings]
        return "\n".join(lines)


def usable_batch(tokens: float, sequence_length: int | None) -> tuple[float, int | None]:
    """The batch rounded to 4, 5, 6 or 7 times a power of two sequences, as (tokens, sequences).

    Without a sequence length: to two significant digits, and None sequences."""
    if not math.isfinite(tokens):
        return math.nan, None
    if not sequence_length:
        return float(f"{tokens:.2g}"), None
    wanted = max(tokens / sequence_length, 1.0)
    quarter = max(1, 2 ** (math.floor(math.log2(wanted)) - 2))
    choices = {quarter * k for k in range(1, 9)}
    sequences = min(choices, key=lambda c: abs(math.log(c / wanted)))
    return float(sequences * sequence_length), sequences


def _published(answer: Mapping[str, object]) -> str:
    doubt = "" if answer["verified"] else " (unverified)"
    return f"{answer['source']}{doubt}: {_pair(answer['learning_rate'], answer['batch_tokens'])}"


def _pair(rate: object, batch: object) -> str:
    """A learning rate and a batch, as far as there are any."""
    parts = []
    if isinstance(rate, float):
        parts.append(f"lr {written(rate, 'rate')}")
    if isinstance(batch, float):
        parts.append(f"batch {written(batch, 'batch')} tokens")
    return ", ".join(parts)
