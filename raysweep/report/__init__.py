"""The HTML report: report(results, folder) writes one self-contained page."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from raysweep.report.write import write_report as report

__all__ = ["report"]


class _CallablePackage(ModuleType):
    """`raysweep.report(results, folder)`: the package bears the name of its one verb."""

    def __call__(self, *args: Any, **options: Any) -> Path:
        return report(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
