"""The HTML report: report(results, folder) writes one self-contained page."""

from raysweep.report.page import report

__all__ = ["report"]
