"""fits.plot: the page's figures as Matplotlib figures, for notebooks and papers."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from raysweep.errors import UserError
from raysweep.report.figure import Axis, Panel, PlotFigure, Points, Series, looks
from raysweep.report.laws import law_figures, names_of
from raysweep.report.surfaces import cell_figure
from raysweep.scaling.fits import Fits


@dataclass(frozen=True)
class FitPlots:
    """The figures of one fitted object; every number in them is one of its answers."""

    fits: Fits

    def __repr__(self) -> str:
        return "<plots: optima(), loss(), surface(cell), trials()>"

    def optima(self) -> Figure:
        """The optimal learning rate of each cell against its size, then the optimal batch.

        Raises:
            UserError: no trial tells both learning rate and batch.
        """
        self._searched()
        rate, batch = self._law("learning-rate"), self._law("batch-tokens")
        panels = (*rate.panels[:2], *batch.panels[:2])
        both = PlotFigure("optima", "", panels, rate.names, width=12, height=3.2)
        return both.to_matplotlib()

    def loss(self) -> Figure:
        """The loss of each cell against its size, with its law where that is determined.

        Raises:
            UserError: no cell has a loss.
        """
        return self._law("loss").to_matplotlib()

    def surface(self, cell: str | None = None) -> Figure:
        """The loss over learning rate and batch in one cell, the largest unless named.

        Raises:
            UserError: no trial tells both learning rate and batch, or no such cell.
        """
        self._searched()
        known = [t.name for t in self.fits.table.searched()]
        name = known[-1] if cell is None else cell
        if name not in known:
            raise UserError(f"no searched cell {name!r}; known: {', '.join(known)}")
        return cell_figure(self.fits, name).figure.to_matplotlib()

    def trials(self) -> Figure:
        """The loss of every trial that counts over its learning rate."""
        self._searched()
        names = names_of(self.fits)
        look = looks(names)
        rows = self.fits.table.trials.dropna(subset=["learning_rate", "loss"])
        series: list[Series] = [
            Points(
                name,
                own["learning_rate"].to_numpy(float),
                own["loss"].to_numpy(float),
                *look[name],
                size=14,
            )
            for name in names
            if len(own := rows[rows["architecture"] == name])
        ]
        panel = Panel(Axis.of("learning_rate"), Axis.of("loss"), tuple(series))
        return PlotFigure("trials", "", (panel,), tuple(names), width=6.4, height=4).to_matplotlib()

    def _law(self, name: str) -> PlotFigure:
        found = {f.name: f for f in law_figures(self.fits, ())}
        if name not in found:
            raise UserError(f"no cell tells of the {name.replace('-tokens', '').replace('-', ' ')}")
        return found[name]

    def _searched(self) -> None:
        if all(e.surface is None for e in self.fits.evidence.values()):
            raise UserError("no trial tells both learning rate and batch: plot.loss() is left")
