"""raysweep: which learning rate and batch size for a model of N parameters on D tokens?

The public API, loaded on first use so that `import raysweep` costs neither torch nor Ray:

    study = raysweep.Study.load("search_spaces/laptop.yaml", set={"search.trials_per_cell": 8})
    print(study.plan())
    raysweep.run(study)                                   # rows in results/laptop
    fits = raysweep.fit("results/laptop")
    print(fits.recommend(params="7B", tokens="1.4T"))
    print(fits.score("held_out.csv"))                     # predicted against known losses
    fits.plot.optima()                                    # a Matplotlib Figure
    raysweep.report("results/laptop")                     # reports/laptop/index.html

`raysweep.import_results` brings results that exist already. A training function of your own gets a
`raysweep.TrialRun`; `raysweep.Sweep` hands trials out to any scheduler.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raysweep.display import show_with

if TYPE_CHECKING:
    from raysweep.display import Plots
    from raysweep.errors import UserError
    from raysweep.report.compare import write_comparison
    from raysweep.report.write import write_report
    from raysweep.report.write import write_report as report
    from raysweep.results import Results
    from raysweep.results.importers import import_results
    from raysweep.scaling.fit import fit
    from raysweep.scaling.fits import Fits
    from raysweep.scaling.recommend import Recommendation
    from raysweep.scaling.sides import Comparison, compare
    from raysweep.search.run import run
    from raysweep.search.sweep import AskedTrial, Sweep
    from raysweep.study import Study
    from raysweep.training.own import TrialRun

__all__ = [
    "AskedTrial",
    "Comparison",
    "Fits",
    "Recommendation",
    "Results",
    "Study",
    "Sweep",
    "TrialRun",
    "UserError",
    "compare",
    "fit",
    "import_results",
    "report",
    "run",
    "write_comparison",
    "write_report",
]

_HOMES = {
    "AskedTrial": "raysweep.search.sweep",
    "Comparison": "raysweep.scaling.sides",
    "Fits": "raysweep.scaling.fits",
    "Recommendation": "raysweep.scaling.recommend",
    "Results": "raysweep.results",
    "Study": "raysweep.study",
    "Sweep": "raysweep.search.sweep",
    "TrialRun": "raysweep.training.own",
    "UserError": "raysweep.errors",
    "compare": "raysweep.scaling.sides",
    "fit": "raysweep.scaling.fit",
    "import_results": "raysweep.results.importers",
    "report": "raysweep.report",
    "run": "raysweep.search.run",
    "write_comparison": "raysweep.report.compare",
    "write_report": "raysweep.report.write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raysweep' has no attribute {name!r}")
    # `report` is the package, which can be called: once imported, its name is taken by it.
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        from raysweep.errors import needs_search

        raise ImportError(needs_search(error, f"raysweep.{name}") or str(error)) from error
    return home if name == "report" else getattr(home, name)


def __dir__() -> list[str]:
    return __all__


def _html_of(thing: object) -> str:
    from raysweep.report.notebook import html_of

    return html_of(thing)


def _plots_of(fits: Any) -> "Plots":
    from raysweep.report.plot import FitPlots

    return FitPlots(fits)


show_with(_html_of, _plots_of)
