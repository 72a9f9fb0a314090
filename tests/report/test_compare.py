"""The page of a comparison: one table of sides first, its ratios those of compare_arms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysweep.report.compare import common_size, ratios_figure, write_comparison
from raysweep.results.schema import row_table
from raysweep.scaling.compare import compare_arms
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import answer
from raysweep.text import between, written

Make = Callable[..., Any]


def test_table_of_sides_comes_first(
    ladder: tuple[Fits, Path], open_page: Make, tmp_path: Path
) -> None:
    fits = ladder[0]
    arms = [fits.arm("dense"), fits.arm("moe")]
    path = write_comparison(arms, tmp_path / "out", png=True, command="raysweep compare x")
    page = open_page(path)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert page.source.index("<table") < page.source.index("<figure")
    size = common_size(arms)
    cells = fits.cells_of("dense").iloc[-1]
    assert size == (cells["params_active_non_embedding"], cells["tokens"])
    for arm in arms:
        told = answer(arm.evidence, arm.architecture, arm.run(*size))
        assert written(told.learning_rate, "rate") in page.text
        assert between(*told.batch_tokens_interval, "batch") in page.text
        assert written(told.loss, "loss") in page.text
        assert written(told.run.compute, "flops") in page.text
    for ratio in compare_arms(arms[0], arms[1]):
        if ratio.ok:
            style = "number" if ratio.quantity == "loss" else "ratio"
            assert written(ratio.ratio.value, style) in page.text
            assert between(ratio.ratio.low, ratio.ratio.high, style) in page.text
    assert set(page.json["figures"]) == {"ratios", "sides"}
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "ratios.png", "sides.png"}
    assert "raysweep compare x" in page.text


def test_losses_of_other_data_are_not_compared(
    ladder: tuple[Fits, Path], make_rows: Make, open_page: Make, tmp_path: Path
) -> None:
    other = fit(row_table(make_rows(("dense",), 3, data_hash="other")).to_pandas())
    arms = [ladder[0].arm("dense"), ladder[0].arm("moe"), other.arm("dense")]
    named = [*arms[:2], type(arms[2])("elsewhere", other.evidence_of("dense"), "dense")]
    path = write_comparison(named, tmp_path / "out", apart={"elsewhere": "the data differ"})
    page = open_page(path)
    assert "Losses are not compared: The data differ." in page.text
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
    arms = [one.arm("dense"), type(one.arm("dense"))("big", two.evidence_of("dense"), "dense")]
    page = open_page(write_comparison(arms, tmp_path / "out"))
    assert "Side by side" in page.text
    assert not {"nan", "None", "inf"} & set(page.text.split())


def test_no_figure_without_a_ratio() -> None:
    assert ratios_figure({"b": []}, ["a", "b"]) is None


@pytest.mark.browser
def test_no_error_in_a_browser(ladder: tuple[Fits, Path], drive: Make, tmp_path: Path) -> None:
    arms = [ladder[0].arm("dense"), ladder[0].arm("moe")]
    path = write_comparison(arms, tmp_path / "out")
    assert drive(path, "return document.querySelectorAll('figure svg').length") == 2
