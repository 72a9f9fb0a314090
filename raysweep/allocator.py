"""glibc's allocator; nothing happens where the C library is another."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, by glibc's malloc.h."""
_LARGEST_MMAP_THRESHOLD = 1 << 25
"""The most that glibc takes."""


def keep_freed() -> None:
    """Keep freed memory for what is allocated next.

    By default activations go back to the system each time they are freed, and every step then
    waits for its pages to be mapped and cleared again.
    """
    _call("mallopt", _MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    _call("mallopt", _TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed() -> None:
    """Return freed memory to the system, free pages between allocations included."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), function)(*arguments)
