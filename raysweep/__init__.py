"""raysweep: which learning rate and batch size for a model of N parameters on D tokens?

The public API, loaded on first use so that `import raysweep` costs neither torch nor Ray:

    study = raysweep.Study.load("search_spaces/laptop.yaml")
    raysweep.run(study)                                   # rows in results/laptop
    fits = raysweep.fit(raysweep.Results.open("results/laptop"))
    print(fits.recommend("dense", params=7e9, tokens=1.4e12))
    raysweep.write_report(raysweep.Results.open("results/laptop"), "reports/laptop")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raysweep.display import show_with

if TYPE_CHECKING:
    from raysweep.errors import UserError
    from raysweep.report import report as write_report
    from raysweep.report.compare import write_comparison
    from raysweep.results import Results
    from raysweep.scaling.compare import Comparison, compare
    from raysweep.scaling.fits import Fits, fit
    from raysweep.search.run import run
    from raysweep.study import Study

__all__ = [
    "Comparison",
    "Fits",
    "Results",
    "Study",
    "UserError",
    "compare",
    "fit",
    "run",
    "write_comparison",
    "write_report",
]

_HOMES = {
    "Comparison": ("raysweep.scaling.compare", "Comparison"),
    "Fits": ("raysweep.scaling.fits", "Fits"),
    "Results": ("raysweep.results", "Results"),
    "Study": ("raysweep.study", "Study"),
    "UserError": ("raysweep.errors", "UserError"),
    "compare": ("raysweep.scaling.compare", "compare"),
    "fit": ("raysweep.scaling.fits", "fit"),
    "run": ("raysweep.search.run", "run"),
    "write_comparison": ("raysweep.report.compare", "write_comparison"),
    # Not `report`: that name is the subpackage's, once it is imported.
    "write_report": ("raysweep.report", "report"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raysweep' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _html_of(thing: object) -> str:
    from raysweep.report.notebook import html_of

    return html_of(thing)


show_with(_html_of)
