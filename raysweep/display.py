"""Notebook views and figures of results: hooks that `raysweep/__init__` fills from the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class InNotebooks:
    """Mixin: a notebook shows the HTML that `draw` makes of the object."""

    def _repr_html_(self) -> str:
        return _draw(self)


class Plots(Protocol):
    """The figures of fits, such as `raysweep.report.plot.FitPlots`."""

    def optima(self) -> Figure: ...
    def loss(self) -> Figure: ...
    def surface(self, cell: str | None = None) -> Figure: ...
    def trials(self) -> Figure: ...


def plots_of(fits: object) -> Plots:
    """The figures of fits."""
    assert _plots is not None, "raysweep's __init__ registers the plots"
    return _plots(fits)


def show_with(draw: Callable[[object], str], plots: Callable[[object], Plots]) -> None:
    """Register `draw`, which makes the HTML of an object, and `plots`, the figures of fits."""
    global _draw, _plots
    _draw, _plots = draw, plots


_draw: Callable[[object], str] = repr
_plots: Callable[[object], Plots] | None = None
