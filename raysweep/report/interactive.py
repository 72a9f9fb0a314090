"""Figures for the page to draw itself: Plotly, packed into the page, and what it is given."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.report.figure import Axis, Contours, Line, Panel, PlotFigure, Points, limits

DIGITS = 6
"""Digits of the numbers that are drawn."""


@cache
def library() -> str:
    """Plotly's script from its wheel, compressed by gzip, in base64; the browser unpacks it."""
    spec = find_spec("plotly")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return packed(script.read_bytes())


def packed(content: bytes) -> str:
    """Content for the browser to unpack."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def packed_figures(figures: Iterable[PlotFigure], rows: Mapping[str, int] | None = None) -> str:
    """All figures of a page, by their names; see `described`."""
    told = {figure.name: described(figure, rows) for figure in figures}
    return packed(json.dumps(told, separators=(",", ":"), allow_nan=False).encode())


def described(figure: PlotFigure, rows: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A figure as plain values: what it is made of, with the limits of its axes; colours are roles,
    and `templates/plots.js` draws it. `rows` are the places of trials in the page's table, by their
    keys; a trial that is not there is at -1."""
    return {
        "label": figure.caption,
        "height": round(96 * figure.height),
        "ratios": list(figure.ratios),
        "choose": figure.choose,
        "panels": [_panel(panel, rows or {}) for panel in figure.panels],
    }


def _panel(panel: Panel, rows: Mapping[str, int]) -> dict[str, Any]:
    return {
        "x": _axis(panel, "x", panel.x),
        "y": _axis(panel, "y", panel.y),
        "neutral": panel.neutral,
        "series": [_series(s, rows) for s in panel.series],
    }


def _axis(panel: Panel, which: str, axis: Axis) -> dict[str, Any]:
    ends = None if axis.names else [_plain(v) for v in limits(panel, which, axis)]
    return {
        "label": axis.label,
        "style": axis.style,
        "log": axis.log and not axis.names,
        "reverse": axis.reverse,
        "names": axis.names,
        "limits": ends,
    }


def _series(s: Points | Line | Contours, rows: Mapping[str, int]) -> dict[str, Any]:
    told: dict[str, Any] = {"name": s.name, "x": _list(s.x), "y": _list(s.y)}
    if isinstance(s, Contours):
        values = [_list(row, 3) for row in np.clip(s.values, 0, 1e3)]
        return {**told, "kind": "contours", "values": values, "levels": s.levels}
    told |= {"legend": s.legend or s.name.split(",")[0], "colour": s.colour}
    if s.low is not None and s.high is not None:
        told |= {"low": _list(s.low), "high": _list(s.high)}
    if isinstance(s, Line):
        return {**told, "kind": "line", "dashed": s.dashed, "thin": s.thin, "end": s.end}
    told |= {"kind": "points", "marker": s.marker, "size": s.size}
    told |= {k: list(v) for k in ("tips", "names", "fills") if (v := getattr(s, k))}
    if s.keys:
        told["rows"] = [rows.get(key, -1) for key in s.keys]
    if s.full is not None:
        told["full"] = [int(v) for v in s.full]
    if s.shades:
        told["shades"] = {name: _list(values) for name, values in s.shades.items()}
    return told


def _list(values: Sequence[float] | np.ndarray, digits: int = DIGITS) -> list[float | None]:
    return [_plain(float(v), digits) for v in values]


def _plain(value: float, digits: int = DIGITS) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
