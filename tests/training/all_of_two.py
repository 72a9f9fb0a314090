"""One of two workers of one process group that makes the runs of several tests in turn; started by
the fixture `of_two`: a process imports for longer than it trains."""

from pathlib import Path
from typing import Any

import one_of_two
import recipe_of_two
import sharded
from workers import work


def task(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    scripts = (one_of_two, recipe_of_two, sharded)
    return {script.__name__: script.task(rank, world_size, folder) for script in scripts}


if __name__ == "__main__":
    work(task)
