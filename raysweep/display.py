"""Objects that show themselves in notebooks. How is the report's business: it is loaded by name."""

from __future__ import annotations

from importlib import import_module


class InNotebooks:
    """Mixin: Jupyter shows what `raysweep.report.notebook` makes of the object."""

    def _repr_html_(self) -> str:
        return import_module("raysweep.report.notebook").html_of(self)
