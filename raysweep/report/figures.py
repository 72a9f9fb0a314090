"""What every figure shares: its data beside its drawing, and the architectures' colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from raysweep.report.style import ARCHITECTURE_COLOURS, Drawing
from raysweep.report.trends import FLOPS, PARAMS, TOKENS

AXIS_NAMES = {PARAMS: "N, active parameters", TOKENS: "D, tokens", FLOPS: "C, training FLOPs"}
AXIS_KINDS = {PARAMS: "count", TOKENS: "count", FLOPS: "scientific"}

MOST_ARCHITECTURES = 6
"""Architectures told apart in one figure."""


@dataclass(frozen=True)
class PlotFigure:
    """A drawing with the data behind it, and the names of what it shows."""

    name: str
    drawing: Drawing
    data: pd.DataFrame
    shown: tuple[str, ...] = ()


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour role of each architecture: c0 to c5, in order, then again from the first."""
    return {n: ARCHITECTURE_COLOURS[i % MOST_ARCHITECTURES] for i, n in enumerate(names)}
