"""fits.plot: the page's figures as Matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.report.plot import FitPlots
from raysweep.results.schema import row_table
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits


def test_figures_show_the_cells(ladder: tuple[Fits, Path]) -> None:
    fits = ladder[0]
    plots = FitPlots(fits)
    optima = plots.optima()
    assert len(optima.axes) == 4
    heights = np.concatenate(
        [np.asarray(c.get_offsets())[:, 1] for c in optima.axes[0].collections]
    )
    assert set(fits.cells["learning_rate"]) <= set(heights)
    assert len(plots.loss().axes) >= 3
    assert len(plots.trials().axes[0].collections) == 2
    surface = plots.surface("dense-1-0")
    assert surface.axes[0].get_xlabel() == "learning rate"
    assert plots.surface()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no searched cell 'x'; known: "):
        plots.surface("x")


def test_without_rates_only_the_loss(make_rows: Callable) -> None:
    bare = {"learning_rate": None, "batch_tokens": None, "batch_sequences": None}
    plots = FitPlots(fit(row_table(make_rows(("dense",), 3, trials=2, **bare)).to_pandas()))
    assert plots.loss().axes
    for plot in (plots.optima, plots.surface, plots.trials):
        with pytest.raises(UserError, match="no trial tells both learning rate and batch"):
            plot()
