"""The rules of the house: the linter sees what breaks them, and no import hides from it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import raysweep
from raysweep.report.notebook import VIEWS

REPO = Path(__file__).resolve().parents[1]

PLANTED = {
    "scaling/estimate.py": "import torch",
    "data/tokens.py": "def later():\n    import ray",
    "results/schema.py": "from raysweep.scaling import estimate",
    "stowaway.py": "",
    "study/fields.py": "from typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from raysweep.study import load",
}
"""One breach each: a forbidden library, a deferred one, an arrow up, a module without a place in
the layers, and a circle for annotations only."""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    shutil.copytree(
        REPO / "raysweep", tmp_path / "raysweep", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> str:
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    # Its messages come wrapped, to a width that it takes from here.
    done = subprocess.run(
        command, cwd=house, env={"COLUMNS": "200"}, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return done.stdout


def test_linter_sees_each_breach(house: Path) -> None:
    assert "4 kept, 0 broken" in lint(house)
    for name, code in PLANTED.items():
        path = house / "raysweep" / name
        path.write_text((path.read_text() if path.exists() else "") + f"\n{code}\n")
    said = lint(house)
    assert "0 kept, 4 broken" in said
    for breach in (
        "raysweep.scaling.estimate -> torch",
        "raysweep.data.tokens -> ray",
        "raysweep.results.schema -> raysweep.scaling.estimate",
        "- raysweep.stowaway",
        "No cycles are allowed in raysweep.study",
    ):
        assert breach in said


def test_no_import_hides_from_the_linter() -> None:
    hidden = {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "raysweep").rglob("*.py")
        if {"import_module", "__import__"} & set(re.findall(r"\w+", path.read_text()))
    }
    # The second one imports a user's code, by the name that a study file gives.
    assert hidden == {"raysweep/__init__.py", "raysweep/training/user_code.py"}


@pytest.mark.parametrize("name", ["Study", "Results", "Fits", "Comparison"])
def test_notebooks_are_told_of_everything_public(name: str) -> None:
    kind = getattr(raysweep, name)
    assert callable(kind._repr_html_)
    assert kind.__name__ in VIEWS
