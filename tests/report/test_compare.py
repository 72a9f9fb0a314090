"""The page of a comparison: one table of sides first, all its numbers the terminal's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysweep.report.compare import ratios_figure, write_comparison
from raysweep.results.schema import row_table
from raysweep.scaling.compare import Arm
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import QUANTITIES
from raysweep.scaling.sides import Comparison
from raysweep.text import between, written

Make = Callable[..., Any]


@pytest.mark.slow
def test_table_of_sides_comes_first(
    ladder: tuple[Fits, Path], open_page: Make, tmp_path: Path
) -> None:
    fits = ladder[0]
    found = Comparison.of([fits.arm("dense"), fits.arm("moe")])
    path = write_comparison(found, tmp_path / "out", png=True, command="raysweep compare x")
    page = open_page(path)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert page.source.index("<table") < page.source.index("<figure")
    cells = fits.cells_of("dense").iloc[-1]
    assert found.size == pytest.approx((cells["params_active_non_embedding"], cells["tokens"]))
    for ratio in found.ratios["moe"]:
        if ratio.ok:
            style = QUANTITIES[ratio.quantity].ratio_style
            assert written(ratio.ratio.value, style) in page.text
            assert between(ratio.ratio.low, ratio.ratio.high, style) in page.text
    assert set(page.json["figures"]) == {"ratios", "sides"}
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "ratios.png", "sides.png"}
    assert "raysweep compare x" in page.text


def sides_shown(source: str) -> list[list[str]]:
    """Name, learning rate, batch, loss and FLOPs of each side, as a terminal writes them."""
    table = source[source.index("<table") : source.index("</table>")]
    rows = re.findall(r"<tr class=.two.>(.*?)</tr>", table)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row)[:5] for row in rows]
    spans = re.compile(r'<span class="interval">(.*?)</span>')
    return [[re.sub("<.*?>", "", spans.sub(r" (\1)", c)).strip() for c in row] for row in cells]


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (3e7, 4e8)])
def test_the_page_shows_the_sizes_and_numbers_of_the_terminal(
    size: tuple[float, float] | None, make_rows: Make, tmp_path: Path
) -> None:
    """Cells that differ by 1 % are paired: each side answers for its own."""
    fits = [
        fit(row_table(make_rows(("dense",), 3, 2, smallest=n, data_hash="one")).to_pandas())
        for n in (2e5, 2.02e5)
    ]
    arms = [
        Arm(name, f.evidence_of("dense"), "dense", data="one")
        for name, f in zip("ab", fits, strict=True)
    ]
    found = Comparison.of(arms, size)
    source = write_comparison(found, tmp_path / "out").read_text()
    lines = [re.split("  +", line.strip()) for line in str(found).splitlines()]
    assert sides_shown(source) == lines[2:4]
    flops = {row[-1] for row in lines[2:4]}
    assert len(flops) == (2 if size is None else 1)
    assert found.size is not None
    params, tokens = written(found.size[0], "params"), written(found.size[1], "tokens")
    assert f"At {params} active parameters on {tokens} tokens" in source


@pytest.mark.slow
def test_losses_of_other_data_are_not_compared(
    ladder: tuple[Fits, Path], make_rows: Make, open_page: Make, tmp_path: Path
) -> None:
    other = fit(row_table(make_rows(("dense",), 3, data_hash="other")).to_pandas())
    elsewhere = Arm("elsewhere", other.evidence_of("dense"), "dense")
    arms = [ladder[0].arm("dense"), ladder[0].arm("moe"), elsewhere]
    page = open_page(write_comparison(arms, tmp_path / "out"))
    assert page.text.count("Other data than dense, or none is told") == 1
    assert "dense, moe and elsewhere" in page.text
    (panel,) = page.json["figures"]["ratios"]["panels"]
    told = {s["name"]: [panel["y"]["names"][round(y)] for y in s["y"]] for s in panel["series"]}
    theirs = told["elsewhere over dense"]
    assert theirs
    assert not any("loss" in row or "FLOPs at" in row for row in theirs)
    assert any("loss at equal" in row for row in told["moe over dense"])


def test_sides_without_rates_or_overlap(make_rows: Make, open_page: Make, tmp_path: Path) -> None:
    bare = {"learning_rate": None, "batch_tokens": None, "batch_sequences": None}
    one = fit(row_table(make_rows(("dense",), 2, trials=3, **bare)).to_pandas())
    two = fit(row_table(make_rows(("dense",), 1, trials=3, smallest=1e9)).to_pandas())
    arms = [one.arm("dense"), Arm("big", two.evidence_of("dense"), "dense")]
    page = open_page(write_comparison(arms, tmp_path / "out"))
    assert "No size lies within the range of every side" in page.text
    assert not {"nan", "None", "inf"} & set(page.text.split())


def test_no_figure_without_a_ratio() -> None:
    assert ratios_figure({"b": []}, ["a", "b"]) is None


@pytest.mark.browser
def test_no_error_in_a_browser(ladder: tuple[Fits, Path], drive: Make, tmp_path: Path) -> None:
    arms = [ladder[0].arm("dense"), ladder[0].arm("moe")]
    path = write_comparison(arms, tmp_path / "out")
    assert drive(path, "return document.querySelectorAll('figure svg').length") == 2
