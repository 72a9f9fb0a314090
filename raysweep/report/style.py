"""The look of figures: colours by role, matplotlib settings, SVG made fit to stand in a page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from raysweep.text import scientific, short

LIGHT: dict[str, str] = {
    "ink": "#1a1f24",
    "muted": "#59636d",
    "faint": "#98a2ab",
    "grid": "#e4e8eb",
    "paper": "#fefefe",
    "bad": "#b3372b",
    "good": "#1f7a4d",
    # Architectures, after Okabe and Ito: told apart by the colour-blind too.
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#b5568d",
    "c4": "#b57a00",
    "c5": "#2a8fc4",
    # How far a loss lies above the best, near to far: lightness alone tells them apart.
    "h0": "#0b3c5d",
    "h1": "#1c6a8a",
    "h2": "#4a9aa6",
    "h3": "#89c2b5",
    "h4": "#c3decf",
    "h5": "#eaf1ea",
}
DARK: dict[str, str] = {
    "ink": "#e7eaec",
    "muted": "#a5aeb6",
    "faint": "#6d7780",
    "grid": "#2c333a",
    "paper": "#14181c",
    "bad": "#ff8a7a",
    "good": "#6fd39b",
    "c0": "#5ab4ea",
    "c1": "#ff9150",
    "c2": "#3ccfa2",
    "c3": "#e79ac8",
    "c4": "#ecb64a",
    "c5": "#9ad4f5",
    "h0": "#ecf7c9",
    "h1": "#a6dbb4",
    "h2": "#5cb3a6",
    "h3": "#33808e",
    "h4": "#235468",
    "h5": "#1b3442",
}
"""The same roles on a dark page. Figures are drawn with `LIGHT`; the page swaps the colours."""

ARCHITECTURE_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
MARKERS = ("o", "s", "^", "D", "v", "P")

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_PLACES = {"d", "x", "y", "width", "height", "points", "transform", "style"}
"""Attributes that place things: a hundredth of a point is enough, a tenth in `LONG` paths."""

LONG = 300
"""Characters of a path that is drawn large, unlike a marker."""

_ROLE = {value: name for name, value in LIGHT.items()}
assert len(_ROLE) == len(LIGHT) == len(DARK)

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "axes.labelsize": 8.5,
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["faint"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: SVG text for the page, and PNG bytes where they were asked for."""

    svg: str
    png: bytes | None = None


class ShownFigure(Figure):
    """A Matplotlib figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        raster = io.BytesIO()
        self.savefig(raster, format="png", dpi=110, facecolor=LIGHT["paper"])
        return raster.getvalue()


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure of a size in inches; 1 inch is 96 pixels on the page."""
    with mpl.rc_context(_RC):
        figure = ShownFigure(figsize=(width, height), layout=layout)
        FigureCanvasSVG(figure)
    return figure


def settings() -> Any:
    """The context to draw in: every artist takes its look from it."""
    return mpl.rc_context(_RC)


def finish(
    figure: Figure,
    name: str,
    label: str,
    tips: Mapping[str, Sequence[str]] | None = None,
    png: bool = False,
    names: Sequence[str] = (),
) -> Drawing:
    """The figure as inline SVG. `name` makes its ids unique, `label` says what it shows.

    `tips` maps the gid of a scatter (or of a group of bars) to one hover text an element, in
    order. `names` are the architectures drawn: a key to them goes into the PNG, which stands alone.
    """
    out = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        image = None
        if png:
            raster = io.BytesIO()
            if names:
                add_key(figure, names)
            figure.savefig(raster, format="png", dpi=192, facecolor=LIGHT["paper"])
            image = raster.getvalue()
    return Drawing(_inline(out.getvalue(), name, label, tips or {}), image)


def add_key(figure: Figure, names: Sequence[str]) -> None:
    """The architectures' colours and markers, above the panels."""
    handles = [
        Line2D([], [], ls="none", marker=marker, color=LIGHT[colour], label=name)
        for name, marker, colour in zip(names, MARKERS, ARCHITECTURE_COLOURS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


def _inline(svg: str, name: str, label: str, tips: Mapping[str, Sequence[str]]) -> str:
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(svg[svg.index("<svg") :])
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        href = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if href is not None:
            element.set("href", href)
    for group, texts in tips.items():
        _add_tips(root, group, texts)
    for group in list(root.iter(f"{{{_SVG}}}g")):
        _share_style(group)
    used = sorted(set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", ET.tostring(root, "unicode"))))
    for element in root.iter():
        if "id" in element.attrib and element.attrib["id"] not in used:
            del element.attrib["id"]
    for element in root.iter():
        for key in _PLACES & element.attrib.keys():
            text = " ".join(element.attrib[key].split())
            digits = 1 if len(text) > LONG else 2
            found = re.sub(r"-?\d+\.\d{2,}", lambda m, n=digits: _rounded(m, n), text)
            element.set(key, re.sub(r" ?([A-Z]) ", r"\1", found) if key == "d" else found)
    width, height = (float(root.attrib.pop(k).removesuffix("pt")) for k in ("width", "height"))
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("style", f"width:{width * 4 / 3:.0f}px")
    for key in ("version",):
        root.attrib.pop(key, None)
    text = ET.tostring(root, "unicode")
    new = {old: f"{name}-{i}" for i, old in enumerate(used)}
    text = re.sub(r'((?: id="|url\(#|href="#))([^")]+)', lambda m: m[1] + new[m[2]], text)
    text = re.sub(r"#[0-9a-f]{6}\b", _as_variable, text)
    text = text.replace("'DejaVu Sans'", "var(--sans,sans-serif)")
    return re.sub(r">\s+<", "><", text)


def _rounded(match: re.Match[str], digits: int) -> str:
    return f"{float(match.group()):.{digits}f}".rstrip("0").rstrip(".")


def _as_variable(match: re.Match[str]) -> str:
    role = _ROLE.get(match.group())
    return f"var(--{role})" if role else match.group()


def _share_style(group: ET.Element) -> None:
    """Gather neighbouring <use> of one style in a <g> that has it: it is most of their length."""
    children = list(group)
    runs: list[list[ET.Element]] = []
    for child in children:
        style = child.get("style") if child.tag == f"{{{_SVG}}}use" else None
        if style is not None and runs and runs[-1][0].get("style") == style:
            runs[-1].append(child)
        else:
            runs.append([child])
    for run in runs:
        if len(run) < 2 or run[0].tag != f"{{{_SVG}}}use":
            continue
        shared = ET.Element(f"{{{_SVG}}}g", {"style": run[0].get("style", "")})
        group.insert(list(group).index(run[0]), shared)
        for element in run:
            del element.attrib["style"]
            group.remove(element)
            shared.append(element)


def _add_tips(root: ET.Element, group: str, texts: Sequence[str]) -> None:
    """A <title> for each drawn element of a group, in order of drawing."""
    for found in root.iter(f"{{{_SVG}}}g"):
        if found.get("id") != group:
            continue
        drawn = _drawn(found)
        for element, text in zip(drawn, texts, strict=False):
            title = ET.SubElement(element, f"{{{_SVG}}}title")
            title.text = text


def _drawn(group: ET.Element) -> list[ET.Element]:
    elements = []
    for child in group:
        if child.tag == f"{{{_SVG}}}defs":
            continue
        if child.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            elements.append(child)
        else:
            elements += _drawn(child)
    return elements


# --- axes --------------------------------------------------------------------------------------


def log_axis(axes: Axes, which: str, style: str = "tokens", most: int = 5) -> None:
    """A logarithmic axis with a few round ticks, written in one of `text.STYLES`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    axis.set_major_locator(FixedLocator(list(log_ticks(low, high, most))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: tick(v, style)))


def tick(value: float, style: str) -> str:
    """A round number beside an axis."""
    if style in ("rate", "flops", "coefficient"):
        return scientific(value)
    return f"{value:.3g}" if style in ("loss", "number") else short(value)


def log_ticks(low: float, high: float, most: int = 5) -> np.ndarray:
    """At most about `most` round numbers within [low, high]: whole decades, or 1-2-5, or finer."""
    if high < 3 * low:
        plain = np.asarray(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        return plain[(plain >= low) & (plain <= high) & (plain > 0)]
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    decades = 10.0 ** np.arange(first, last + 1)
    within = decades[(decades >= low * 0.999) & (decades <= high * 1.001)]
    if len(within) > most:
        return within[:: int(np.ceil(len(within) / most))]
    best = within
    for steps in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = np.sort(np.outer(decades, steps).ravel())
        ticks = ticks[(ticks >= low * 0.999) & (ticks <= high * 1.001)]
        if len(ticks) > most:
            break
        best = ticks
    return best


def spread(values: np.ndarray, apart: float) -> np.ndarray:
    """Positions for labels at `values` [n], moved as little as needed to lie `apart`."""
    order = np.argsort(values, kind="stable")
    placed = np.asarray(values, dtype=float)[order].copy()
    for _ in range(100):
        gaps = np.diff(placed)
        tight = gaps < apart * 0.999
        if not tight.any():
            break
        for i in np.flatnonzero(tight):
            push = (apart - (placed[i + 1] - placed[i])) / 2
            if push > 0:
                placed[i] -= push
                placed[i + 1] += push
    result = np.empty_like(placed)
    result[order] = placed
    return result
