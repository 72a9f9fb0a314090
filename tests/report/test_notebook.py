"""Objects in a notebook: self-contained HTML; the committed notebook runs as it stands."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import raysweep
from raysweep.report.notebook import MAX_ROWS, html_of
from raysweep.results.schema import row_table
from raysweep.results.store import Results
from raysweep.scaling.compare import Arm, Ratio, compare_arms
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits

REPO = Path(__file__).resolve().parents[2]
NOTEBOOK = REPO / "reports/notebook.ipynb"


@pytest.fixture(scope="module")
def fits(make_rows: Callable[..., list[dict[str, Any]]]) -> Fits:
    return fit(row_table(make_rows()).to_pandas())


def well_made(html: str) -> str:
    """The HTML, checked: balanced, no script, nothing from elsewhere, every id its own."""
    ET.fromstring(html.replace("&nbsp;", " ").replace("<br>", ""))
    assert "<script" not in html
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', html):
        assert target in ids
    for role in ("prefers-color-scheme: dark", "data-jp-theme-light=false", "background: var("):
        assert role in html
    return html


@pytest.mark.slow
def test_fits(fits: Fits) -> None:
    html = well_made(html_of(fits))
    assert html.count("<svg") == 3
    assert f"Fits of {len(fits.cells)} cells" in html
    for cell in fits.cells.index:
        assert str(cell) in html
    assert len(html) < 600_000


@pytest.mark.slow
def test_two_outputs_share_no_ids(
    fits: Fits, make_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    one = set(re.findall(r'\bid="([^"]+)"', html_of(fits)))
    other = fit(row_table(make_rows(("dense",), scales=3)).to_pandas())
    two = set(re.findall(r'\bid="([^"]+)"', html_of(other)))
    assert one
    assert two
    assert not one & two


def test_recommendation(fits: Fits) -> None:
    answer = fits.recommend("moe", params="1B", tokens="20B")
    html = well_made(html_of(answer))
    assert "1B active non-embedding parameters, 8 experts, top-2, 20B tokens" in html
    assert f"{answer.loss:.4f}" in html
    assert "Step Law" in html
    assert html.count("beyond the cells by") == 1


def test_results_and_study(
    make_results: Callable[..., Results], make_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    results = make_results(make_rows())
    html = well_made(html_of(results))
    assert "72 trials in 8 cells" in html
    study = raysweep.Study.load(REPO / "search_spaces/laptop.yaml")
    html = well_made(html_of(study))
    assert "12 cells" in html
    assert all(c.name in html for c in study.cells)


def test_many_cells_are_counted_not_listed(
    make_results: Callable[..., Results], make_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    results = make_results(make_rows(("dense",), scales=40, trials=1))
    html = well_made(html_of(results))
    assert f"and {40 - MAX_ROWS} more" in html


def test_names_are_escaped(
    make_results: Callable[..., Results], make_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = [r | {"cell": "<script>alert(1)</script>"} for r in make_rows(scales=1)]
    well_made(html_of(make_results(rows)))


def test_nothing_to_show(make_results: Callable[..., Results]) -> None:
    empty = make_results([])
    well_made(html_of(empty))
    well_made(html_of(fit(empty.to_pandas())))


@dataclass
class Comparison:
    """What a comparison has, by the name that its view goes by."""

    arms: tuple[Arm, ...]
    size: tuple[float, float] | None
    answers: Mapping[str, object]
    ratios: dict[str, list[Ratio]]
    apart: dict[str, str] = field(default_factory=dict)


def test_comparison(fits: Fits) -> None:
    arms = fits.arm("dense"), fits.arm("moe")
    answers = {a.name: fits.recommend(a.architecture, 1e6, 2e7) for a in arms}
    shown = Comparison(
        arms, (1e6, 2e7), answers, {"moe": compare_arms(*arms)}, {"moe": "the data differ"}
    )
    html = well_made(html_of(shown))
    assert "At 1M active parameters and 20M tokens" in html
    assert f"{answers['moe'].loss:.4f}" in html  # type: ignore[union-attr]
    assert "The data differ." in html
    assert "learning rate at equal N and D" in html
    assert html.count("<svg") == 1


def test_unknown_things_have_no_look() -> None:
    with pytest.raises(TypeError, match="int"):
        html_of(1)


# --- the committed notebook --------------------------------------------------------------------


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text())


@pytest.mark.slow
def test_committed_notebook_runs(notebook: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {}
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 6
    for cell in cells:
        code = "".join(cell["source"])
        exec(compile(code, "cell", "exec"), names)


def test_committed_notebook_was_executed_here(notebook: dict[str, Any]) -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 2_000_000
    counts = [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", ())]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("text/html" in o.get("data", {}) for o in outputs) >= 4
    for trace in ("/home/", "/work/", "/tmp/", "/root/"):
        assert trace not in text
