"""The committed examples: pages of their own rows, and the spreadsheet that README imports."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.imports import example_table
from raysweep.results.importers import import_file

REPORTS = Path(__file__).parents[2] / "reports"
EXAMPLES = REPORTS / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/index.html")), ids=lambda p: p.parent.name)
def test_pages_are_small_and_tell_no_path(path: Path) -> None:
    page = path.read_text()
    assert len(page.encode()) < 4_000_000  # half of it is Plotly
    command = re.search(r'class="command">([^<]*)', page)
    assert command
    assert not re.search(r"(^| |=)/", command[1])


def test_the_log_is_the_planted_one_and_its_page_says_so() -> None:
    path = EXAMPLES / "imported" / "runs.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path), example_table().reset_index(drop=True))
    rows = import_file("csv", path)
    assert rows["excluded"].notna().sum() >= 10  # cut short, and wrong units
    page = (EXAMPLES / "imported" / "index.html").read_text()
    for said in ("planted log of two optimizers", "adamw", "muon", "adjusted for weight_decay"):
        assert said in page
