"""The results table: Parquet is the only truth."""

from raysweep.results.store import Results

__all__ = ["Results"]
