"""Search-space files: `schema` says what may stand in one, `load` reads it, `study` expands it."""

from raysweep.config.cells import Architecture, Horizon, ModelSettings, Resources, ScaleEntry
from raysweep.config.schema import Data, SearchSpace, Target, Tokenizer
from raysweep.config.study import Cell, Study, TrialSpec, vocabulary_size
from raysweep.config.trials import Recipe, Search

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
