"""The process group that a user's function finds."""

from pathlib import Path

import pytest
from workers import run_workers


@pytest.mark.slow
def test_a_function_may_end_its_group_while_its_model_lives(tmp_path: Path) -> None:
    """Gloo's threads may want Python's lock just then: the model must not wait for them with it."""
    assert run_workers("ends_its_group.py", tmp_path) == [12, 12]
