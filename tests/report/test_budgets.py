"""The figure of held budgets: each architecture's own runs, law and parabolas, side by side."""

from pathlib import Path

import numpy as np
import pandas as pd

from raysweep.report.budgets import split_figure, splits
from raysweep.report.figure import Line, Points
from raysweep.scaling.fit import fit
from raysweep.study import Study


def test_profiles_law_and_parabolas_are_each_architectures_own() -> None:
    study = Study.load(Path(__file__).parents[2] / "search_spaces/wang2024-small.yaml")
    exponents = {"dense": (0.35, 0.36), "moe": (0.30, 0.4317)}
    rng = np.random.default_rng(0)
    rows = []
    for cell in study.cells:
        a, b = exponents[cell.architecture]
        n, d = cell.counts.params_active_non_embedding, cell.tokens
        loss = 1.8 + 0.6 * (n / 1e8) ** -a + 0.6 * a / b * (d / 1.6e9) ** -b
        rows.append(
            {
                "architecture": cell.architecture,
                "params_active_non_embedding": n,
                "params_total_non_embedding": cell.counts.params_total_non_embedding,
                "params_dense": cell.params_dense,
                "tokens": d,
                "flops_per_token": cell.counts.flops_per_token,
                "experts": cell.shape.experts,
                "top_k": cell.shape.top_k,
                "loss": loss * np.exp(0.001 * rng.standard_normal()),
            }
        )
    frame = pd.DataFrame(rows)
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
