"""How a benchmark is started as a program, and where its numbers go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from raysweep.errors import UserError


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A command line whose `--json FILE` says where `save` is to write."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write every number here")
    return parser


def save(file: Path | None, numbers: object) -> None:
    """Write what was measured, where a file is named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(numbers, indent=1) + "\n")


def start(main: Callable[[], object]) -> None:
    """Run `main`; a user's mistake is one line on stderr and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
