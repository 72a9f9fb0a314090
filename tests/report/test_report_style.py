"""How numbers are written, ticks chosen, labels kept apart, and SVG made inline."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from raysweep.report.numbers import NOTHING, Numbers
from raysweep.report.reading import listed
from raysweep.report.style import (
    LIGHT,
    finish,
    log_ticks,
    new_figure,
    settings,
    spread,
)


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


def test_numbers_name_their_place_and_are_escaped() -> None:
    numbers = Numbers({"a/b": {"<i>": [1.5, None]}, "n": "text"})
    assert numbers("number", "a/b", ("<i>", 0)) == Markup(
        '<span class="n" data-key="/a~1b/&lt;i&gt;/0">1.5</span>'
    )
    for missing in (("a/b", "<i>", 1), ("a/b", "<i>", 7), ("n",), ("nothing", "here")):
        assert numbers("number", *missing) == NOTHING


def test_lists_of_names_end_in_a_count() -> None:
    assert listed(["<a>", "b", "c"], most=2) == "<b>&lt;a&gt;</b>, <b>b</b> and 1 more"


def test_svg_has_its_own_ids_variables_and_hover_texts() -> None:
    def draw(name: str) -> str:
        with settings():
            figure = new_figure(3, 2)
            axes = figure.subplots()
            axes.plot([0, 1], [0, 1], color=LIGHT["c0"], clip_on=True)
            axes.scatter([0, 1, 2], [2, 1, 0], gid="dots", color=LIGHT["c1"])
            return finish(figure, name, 'a "label"', {"dots": ["<one>", "two", "three"]}).svg

    one, two = draw("one"), draw("two")
    assert one == draw("one")  # the same figure is the same text
    assert "var(--c0)" in one
    assert "<title>&lt;one&gt;</title>" in one
    assert one.count("<title>") == 3
    assert 'aria-label="a &quot;label&quot;"' in one
    for text in ("<metadata", "<style", "xlink", "DOCTYPE"):
        assert text not in one
    ids = [part.split('"')[0] for part in one.split(' id="')[1:]]
    assert ids
    assert not set(ids) & {part.split('"')[0] for part in two.split(' id="')[1:]}


def test_png_where_asked_for() -> None:
    with settings():
        figure = new_figure(3, 2)
        figure.subplots().plot([0, 1], [0, 1])
        drawing = finish(figure, "one", "a line", png=True, names=("dense", "moe"))
    assert drawing.png is not None
    assert drawing.png.startswith(b"\x89PNG")
