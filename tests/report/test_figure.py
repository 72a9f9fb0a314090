"""Figures as data: what is in them, how they are drawn, ticks, labels, and SVG made inline."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.report.figure import Axis, Contours, Line, Panel, PlotFigure, Points
from raysweep.report.render import sentence
from raysweep.report.style import (
    LIGHT,
    ShownFigure,
    finish,
    log_ticks,
    new_figure,
    settings,
    spread,
)


def simple(**override: object) -> PlotFigure:
    x = np.array([1e3, 1e5, 1e7])
    dots = Points(
        "dots", x, 1 / x, "c1", low=0.5 / x, high=2 / x, tips=["<one>", "two", "three"],
        names=["a", "b", "c"], full=np.array([True, False, True]),
    )  # fmt: skip
    line = Line("law", x, 2 / x, "c0", 1 / x, 4 / x, end="D 4B")
    panel = Panel(Axis("N", "params"), Axis("rate", "rate"), (line, dots))
    return PlotFigure("one", 'a "label"', (panel,), **override)  # type: ignore[arg-type]


def test_data_are_every_point_with_its_interval() -> None:
    data = simple().to_pandas()
    assert list(data.columns) == ["x_is", "y_is", "what", "name", "x", "y", "low", "high"]
    dots = data[data["what"] == "dots"]
    assert dots["name"].tolist() == ["a", "b", "c"]
    assert dots[["x", "y", "low", "high"]].to_numpy()[1].tolist() == [1e5, 1e-5, 5e-6, 2e-5]
    assert (data["what"] == "law").sum() == 3


def test_lists_name_their_rows_and_contours_their_values() -> None:
    dots = Points("held", np.array([0.9, 1.2]), np.array([0.0, 1.0]))
    listed = Panel(Axis("ratio", "number"), Axis("", names=("small", "large")), (dots,), 1.0)
    assert PlotFigure("l", "", (listed,)).to_pandas()["y"].tolist() == ["small", "large"]
    grid = Contours("s", np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.eye(2), (0.1, 0.5, 0.9))
    panel = Panel(Axis("x"), Axis("y"), (grid,))
    assert PlotFigure("c", "", (panel,)).to_pandas()["value"].tolist() == [1, 0, 0, 1]


def test_svg_has_its_own_ids_variables_and_hover_texts() -> None:
    one, two = simple().draw().svg, simple(key=("x",)).draw().svg
    assert one == two  # the same data are the same drawing
    assert "var(--c0)" in one
    assert one.count("<title>") == 3
    assert "<title>&lt;one&gt;</title>" in one
    assert 'aria-label="a &quot;label&quot;"' in one
    assert "D 4B" in one
    for text in ("<metadata", "<style", "xlink", "DOCTYPE"):
        assert text not in one
    with settings():
        figure = new_figure(3, 2)
        figure.subplots().plot([0, 1], [0, 1])
        other = finish(figure, "two", "a line").svg
    ids = [part.split('"')[0] for part in one.split(' id="')[1:]]
    assert ids
    assert not set(ids) & {part.split('"')[0] for part in other.split(' id="')[1:]}


def test_png_and_matplotlib_draw_the_same() -> None:
    figure = simple(names=("dense", "moe"))
    drawing = figure.draw(png=True)
    assert drawing.png is not None
    assert drawing.png.startswith(b"\x89PNG")
    drawn = figure.to_matplotlib()
    (axes,) = drawn.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    offsets = np.asarray(axes.collections[-1].get_offsets())
    assert offsets[:, 1] == pytest.approx(1 / np.array([1e3, 1e5, 1e7]))
    assert isinstance(drawn, ShownFigure)
    assert drawn._repr_png_().startswith(b"\x89PNG")


def test_limits_hold_points_and_lines_not_far_intervals() -> None:
    x = np.array([1.0, 10.0])
    wide = Points("w", x, np.array([1.0, 2.0]), low=np.array([1e-9, 1e-9]), high=x * 1e9)
    axes = PlotFigure("w", "", (Panel(Axis("x"), Axis("y"), (wide,)),)).to_matplotlib().axes[0]
    low, high = axes.get_ylim()
    assert low < 1 < 2 < high
    assert low > 0.2
    assert high < 10


@given(st.floats(1e-9, 1e15), st.floats(1.05, 1e9), st.integers(3, 8))
def test_ticks_lie_inside_and_are_few(low: float, factor: float, most: int) -> None:
    ticks = log_ticks(low, low * factor, most)
    assert len(ticks) <= most + 2
    assert (ticks >= low * 0.999).all()
    assert (ticks <= low * factor * 1.001).all()
    if factor > 12:
        assert len(ticks) >= 1


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_labels_are_kept_apart_in_order(values: list[float]) -> None:
    placed = spread(np.array(values), 0.5)
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.sort(placed)) > 0.5 * 0.95).all()
    assert (np.diff(placed[order]) > 0).all()


def test_labels_with_room_stay() -> None:
    values = np.array([3.0, 1.0, 2.0])
    assert spread(values, 0.5).tolist() == values.tolist()


def test_sentences_are_plain() -> None:
    assert sentence(" 1 edge: learning_rate low ") == "1 edge: learning rate low."
    assert sentence("Did you?") == "Did you?"
    assert set(LIGHT) >= {"good", "bad", "c0", "h5"}
