"""What this machine says of itself and of this process, asked without PyTorch."""

from __future__ import annotations

import contextlib
import platform
import resource
from pathlib import Path

_MAXRSS_UNIT = 1 if platform.system() == "Darwin" else 1024


def cpu_name() -> str:
    """The model of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Most bytes that this process has held, on Linux since `reset_peak_memory`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return _MAXRSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory_of_children() -> int:
    """Of the largest process that this one has started so far and seen to its end."""
    return _MAXRSS_UNIT * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def reset_peak_memory() -> None:
    """Set the peak back to what is held now; Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
