"""fits.plot: figures of fits, drawn by Matplotlib, for notebooks and papers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure

from raysweep.errors import UserError
from raysweep.scaling.fits import Fits
from raysweep.scaling.optima.readings import Optimum
from raysweep.scaling.runs import describe_run
from raysweep.study.shape import RunSize
from raysweep.text import short, written

POINTS = 25
"""Sizes along a curve."""

BEYOND = 10.0
"""Curves go on to this many times the largest cell, along its tokens a parameter."""

GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Contours of a surface: shares above the best loss."""

_UNITS = {"learning_rate": "peak learning rate", "batch_tokens": "batch, tokens"}


class Figure(_Figure):
    """A Matplotlib figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


@dataclass(frozen=True)
class FitPlots:
    """The figures of one fitted object; every number in them is one of its answers."""

    fits: Fits

    def __repr__(self) -> str:
        return "<plots: optima(), loss(), surface(cell), trials()>"

    def optima(self) -> Figure:
        """The optimal learning rate and batch over N: cells with their intervals, and the law with
        its 95 % band along the tokens a parameter of each architecture's largest cell.

        Raises:
            UserError: no trial tells its learning rate and batch.
        """
        self._searched()
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, target in zip(axes, _UNITS, strict=True):
            for name, colour in self._coloured():
                found = self.fits.optima.get("model", {})
                cells = [c for c in self.fits.cells_of(name).index if c in found]
                _dots(
                    axis,
                    [self._size(name, c) for c in cells],
                    [found[c] for c in cells],
                    target,
                    colour,
                    name,
                )
                runs = self._along(name)
                each = [self.fits.evidence_of(name).optimum(run) for run in runs]
                known = [e.estimates()[target == "batch_tokens"] for e in each if e is not None]
                _band(axis, runs, [(e.value, e.low, e.high) for e in known], colour)
            _logarithmic(axis, "N, active non-embedding parameters", _UNITS[target])
        axes[0].legend()
        return figure

    def loss(self) -> Figure:
        """The loss at the optimum over N: cells, and the law of the loss with its 95 % band, where
        it is determined."""
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.subplots()
        for name, colour in self._coloured():
            cells = self.fits.cells_of(name).dropna(subset=["loss"])
            axis.plot(
                cells["params_active_non_embedding"], cells["loss"], "o", color=colour, label=name
            )
            runs = self._along(name)
            losses = [self.fits.evidence_of(name).loss(name, run).loss for run in runs]
            _band(axis, runs, [(e.value, e.low, e.high) for e in losses], colour)
        _logarithmic(axis, "N, active non-embedding parameters", "loss, nats a token")
        axis.legend()
        return figure

    def surface(self, cell: str | None = None) -> Figure:
        """The loss over learning rate and batch in one cell, the largest unless named: contours of
        the share above the best loss, the trials, and the optimum with its intervals.

        Raises:
            UserError: no trial tells its learning rate and batch, or no such cell.
        """
        self._searched()
        trials = {t.name: t for t in self.fits.table.searched()}
        cell = list(trials)[-1] if cell is None else cell
        if cell not in trials:
            raise UserError(f"no searched cell {cell!r}; known: {', '.join(trials)}")
        own = trials[cell]
        evidence = next(e for e in self.fits.evidence.values() if cell in e.cells.index)
        optimum, surface = evidence.optimum(evidence.sizes[cell]), evidence.surface
        assert optimum is not None
        assert surface is not None
        rate, batch = optimum.estimates()
        rates = _reach(np.r_[own.learning_rate, own.failed_learning_rate, rate.value])
        batches = _reach(np.r_[own.batch_tokens, own.failed_batch_tokens, batch.value])
        x, y = np.meshgrid(rates, batches)
        loss, _ = surface.predict(cell, x, y)
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axis = figure.subplots()
        lines = axis.contour(x, y, loss / optimum.loss - 1, levels=GAPS, cmap="viridis_r")
        axis.clabel(lines, fmt=lambda gap: f"{100 * gap:g} %", fontsize=8)
        dots = axis.scatter(own.learning_rate, own.batch_tokens, c=own.loss, cmap="viridis_r", s=28)
        figure.colorbar(dots, ax=axis, label="loss of the trials, nats a token")
        if len(own.failed_learning_rate):
            axis.plot(
                own.failed_learning_rate,
                own.failed_batch_tokens,
                "x",
                color="tab:red",
                label="diverged",
            )
        axis.errorbar(
            [rate.value],
            [batch.value],
            xerr=[[rate.value - rate.low], [rate.high - rate.value]],
            yerr=[[batch.value - batch.low], [batch.high - batch.value]],
            fmt="*",
            color="black",
            markersize=11,
            label="optimum, 95 %",
        )
        _logarithmic(axis, _UNITS["learning_rate"], _UNITS["batch_tokens"])
        axis.set_xlim(rates[0], rates[-1])
        axis.set_ylim(batches[0], batches[-1])
        axis.set_title(f"{cell}: best loss {written(optimum.loss, 'loss')}")
        axis.legend()
        return figure

    def trials(self) -> Figure:
        """The loss of every trial that counts over its learning rate, coloured by N."""
        self._searched()
        rows = self.fits.table.trials.dropna(subset=["learning_rate", "loss"])
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.subplots()
        dots = axis.scatter(
            rows["learning_rate"].to_numpy(float),
            rows["loss"].to_numpy(float),
            c=rows["params_active_non_embedding"].to_numpy(float),
            norm="log",
            s=18,
        )
        figure.colorbar(dots, ax=axis, label="N, active non-embedding parameters")
        _logarithmic(axis, _UNITS["learning_rate"], "loss, nats a token")
        return figure

    def _searched(self) -> None:
        if all(e.surface is None for e in self.fits.evidence.values()):
            raise UserError("no trial tells its learning rate and batch: plot.loss() is left")

    def _coloured(self) -> Iterator[tuple[str, str]]:
        return zip(self.fits.architectures, cycle(f"C{k}" for k in range(10)), strict=False)

    def _size(self, name: str, cell: str) -> RunSize:
        return self.fits.evidence_of(name).sizes[cell]

    def _along(self, name: str) -> list[RunSize]:
        """Runs from the smallest cell's N to beyond the largest's, at its tokens a parameter."""
        cells = self.fits.cells_of(name)
        largest = cells.iloc[-1]
        column = cells["params_active_non_embedding"].to_numpy(float)
        ratio = float(largest["tokens"]) / float(largest["params_active_non_embedding"])
        runs = [
            describe_run(
                cells,
                float(n),
                float(n) * ratio,
                experts=int(largest["experts"]),
                top_k=int(largest["top_k"]),
                group=str(largest["group"]),
            )
            for n in np.geomspace(column.min(), BEYOND * column.max(), POINTS)
        ]
        # The law's curve does not jump to the cells that it passes.
        return [replace(run, name="") for run in runs]


def _dots(
    axis: Axes,
    runs: Sequence[RunSize],
    optima: Sequence[Optimum],
    target: str,
    colour: str,
    name: str,
) -> None:
    inside = np.array([o.interior for o in optima], dtype=bool)
    n = np.array([run.params_active_non_embedding for run in runs])
    value = np.array([getattr(o, target) for o in optima])
    axis.plot(n[inside], value[inside], "o", color=colour, label=name)
    axis.plot(n[~inside], value[~inside], "o", color=colour, markerfacecolor="none")


def _band(
    axis: Axes, runs: Sequence[RunSize], values: Sequence[tuple[float, float, float]], colour: str
) -> None:
    if len(values) != len(runs):
        return
    n = np.array([run.params_active_non_embedding for run in runs])
    middle, low, high = np.array(values).T
    axis.plot(n, middle, color=colour)
    axis.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0)


def _logarithmic(axis: Axes, x: str, y: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if x.startswith("N"):
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.grid(alpha=0.25)


def _reach(values: np.ndarray) -> np.ndarray:
    """A grid over values and half a step of a factor of two beyond them."""
    return np.geomspace(values.min() / 1.4, values.max() * 1.4, 80)
