"""The committed examples: pages of their own rows, and the spreadsheet that README imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raysweep.results import Results
from raysweep.results.importers import import_file

REPORTS = Path(__file__).parents[2] / "reports"
EXAMPLES = REPORTS / "examples"


@pytest.mark.parametrize("name", ["laptop", "imported"])
def test_pages_are_small_and_tell_no_path(name: str) -> None:
    page = (EXAMPLES / name / "index.html").read_text()
    assert len(page.encode()) < 2_000_000
    command = re.search(r'class="command">([^<]*)', page)
    assert command
    assert not re.search(r"(^| |=)/", command[1])


def test_the_spreadsheet_holds_the_runs_of_the_demo() -> None:
    mapping = re.search(r"(architecture=model\S+)", (REPORTS / "README.md").read_text())
    assert mapping
    rows = import_file("csv", EXAMPLES / "imported" / "runs.csv", mapping[1])
    demo = Results.open(EXAMPLES / "laptop" / "results").to_pandas()
    assert len(rows) == len(demo)
    assert rows["excluded"].isna().all()
    for column in ("loss", "learning_rate", "batch_tokens", "tokens"):
        assert sorted(rows[column]) == pytest.approx(sorted(demo[column]), rel=1e-6)
