"""Rows whose strings are markup, formulas and paths: the page shows them and does nothing."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from raysweep.report import report
from raysweep.report.render import csv_text
from raysweep.results import Results

EVIL = "</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>${{7*7}}$\\frac{</style>"
COLUMNS = ("study", "strategy", "reason", "device", "worker", "versions", "git_revision", "source")


class Tags(HTMLParser):
    """What a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.handlers += [v for _, v in attrs if v and v.strip().lower().startswith("javascript:")]


def tags(page: Path) -> Tags:
    found = Tags()
    found.feed(page.read_text())
    return found


def test_strings_of_rows_stay_strings(
    make_rows: Callable[..., list[dict]],
    make_results: Callable[..., Results],
    tmp_path: Path,
) -> None:
    rows = make_rows(("dense",), scales=2, trials=5)
    clean = tags(report(make_results(rows), tmp_path / "clean"))
    for row in rows:
        row |= dict.fromkeys(COLUMNS, EVIL) | {"trial_key": f"evil-{row['trial_key']}"[:64]}
        for name in ("architecture", "scale", "cell"):
            row[name] = f"{row[name]}{EVIL}/../../../x"
    page = report(make_results(rows), tmp_path / "evil", png=True)
    found = tags(page)
    assert found.tags["script"] == clean.tags["script"]
    assert found.tags.get("img", 0) == clean.tags.get("img", 0)
    assert found.tags.get("style") == clean.tags.get("style")
    assert not found.handlers
    assert "onerror=alert(1)>" not in page.read_text()
    assert "onerror=alert(1)" in page.read_text(), "the rows are shown"
    assert all(p.resolve().is_relative_to(tmp_path / "evil") for p in tmp_path.rglob("*.png"))
    assert not list(tmp_path.glob("*.png"))


def test_text_of_a_download_is_no_formula() -> None:
    text = csv_text(pd.DataFrame({"name": ["=1+1", "@x", "+x", "-x", "plain", None], "v": -1.0}))
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == [
        *("'=1+1", "'@x", "'+x", "'-x", "plain", ""),
    ]
    assert text.count("-1") == 6
