"""Search-space files: `schema` says what may stand in one, `load` reads it, `study` expands it."""

from raysweep.config.schema import (
    Architecture,
    Data,
    Horizon,
    ModelSettings,
    Recipe,
    Resources,
    ScaleEntry,
    Search,
    SearchSpace,
    Target,
    Tokenizer,
)
from raysweep.config.study import Cell, Study, TrialSpec, vocabulary_size

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
