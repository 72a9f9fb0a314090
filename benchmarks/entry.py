"""How a benchmark is started as a program."""

from __future__ import annotations

import sys
from collections.abc import Callable

from raysweep.errors import UserError


def start(main: Callable[[], object]) -> None:
    """Run `main`; a user's mistake is one line on stderr and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
