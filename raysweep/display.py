"""Objects that show themselves in notebooks. How is the report's business: it is told at import."""

from __future__ import annotations

from collections.abc import Callable


class InNotebooks:
    """Mixin: a notebook shows the HTML that `draw` makes of the object."""

    def _repr_html_(self) -> str:
        return _draw(self)


def show_with(draw: Callable[[object], str]) -> None:
    """Let `draw` make the HTML of every object that shows itself."""
    global _draw
    _draw = draw


_draw: Callable[[object], str] = repr
