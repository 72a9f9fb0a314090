"""Search-space files: `schema` says what may stand in one, `load` reads it, `study` expands it."""

from raysweep.study.cells import Architecture, Horizon, ModelSettings, Resources, ScaleEntry
from raysweep.study.schema import Data, SearchSpace, Target, Tokenizer
from raysweep.study.spec import Cell, TrialSpec
from raysweep.study.study import Study, vocabulary_size
from raysweep.study.trials import Recipe, Search

__all__ = [
    "Architecture",
    "Cell",
    "Data",
    "Horizon",
    "ModelSettings",
    "Recipe",
    "Resources",
    "ScaleEntry",
    "Search",
    "SearchSpace",
    "Study",
    "Target",
    "Tokenizer",
    "TrialSpec",
    "vocabulary_size",
]
