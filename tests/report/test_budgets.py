"""The figure of held budgets: each architecture's own runs, law and parabolas, side by side."""

from raysweep.report.budgets import split_figure, splits
from raysweep.report.figure import Line, Points
from raysweep.scaling.fit import fit


def test_profiles_law_and_parabolas_are_each_architectures_own(isoflop_profiles) -> None:
    frame = isoflop_profiles("wang2024-small", (1e8, 1.6e9), 0.6, 0.001)
    fits = fit(frame)
    figure = split_figure(fits, splits(fits))
    assert figure is not None
    profiles = figure.panels[0].series
    for name, own in frame.groupby("architecture"):
        (runs,) = (s for s in profiles if isinstance(s, Points) and s.name == f"{name}, runs")
        assert sorted(runs.y) == sorted(own["loss"])
        for what in ("law", "parabola"):
            lines = [s for s in profiles if isinstance(s, Line) and s.name == f"{name}, {what}"]
            assert len(lines) == 3, (name, what)
        best = [s for s in figure.panels[1].series if s.name == f"{name}, parabolas"]
        assert len(best) == 1
