"""From a template and what it says to a file: HTML, scripts inlined, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raysweep.report.figure import PlotFigure
from raysweep.report.interactive import library
from raysweep.report.style import DARK, LIGHT
from raysweep.scaling.compare import EQUALS
from raysweep.scaling.quantities import QUANTITIES, TARGETS
from raysweep.text import between, estimated, written


def environment() -> Environment:
    """The templates of this package, with the filters that write numbers."""
    env = Environment(
        loader=PackageLoader("raysweep.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals |= {"quantities": QUANTITIES, "equals": EQUALS}
    env.filters["num"] = lambda value, style: written(value, style)
    env.filters["est"] = lambda value, style: estimated(value, style=style)
    env.filters["span"] = lambda ends, style: between(ends[0], ends[1], style)
    env.filters["script"] = _script
    env.filters["sentence"] = sentence
    return env


def render(template: str, scripts: Sequence[str], context: Mapping[str, Any]) -> str:
    """A template of this package as one page that needs nothing else, with `scripts` in order."""
    folder = files("raysweep.report") / "templates"
    css, *texts = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", *scripts))
    looks = {"css": Markup(css), "js": Markup("".join(texts)), "light": LIGHT, "dark": DARK}
    return environment().get_template(template).render(**looks, **context)


def figure_context(figures: Mapping[str, PlotFigure]) -> dict[str, Any]:
    """What every page says of its figures: themselves, drawn, and what draws them anew."""
    return {
        "figures": figures,
        "drawings": {name: f.draw().svg for name, f in figures.items()},
        "library": library(),
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_page(
    folder: str | os.PathLike[str], html: str, figures: Iterable[PlotFigure] = ()
) -> Path:
    """Write `folder/index.html`, and `figures` beside it as `NAME.png`; return the page's path."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    page = target / "index.html"
    replace_file(page, html.encode())
    for figure in figures:
        image = figure.draw(png=True).png
        assert image is not None
        (target / f"{figure.name}.png").write_bytes(image)
    return page


def sentence(text: str) -> str:
    """Words as a sentence: a capital first, a full stop last."""
    plain = text.strip()
    for column in TARGETS:
        plain = plain.replace(column, QUANTITIES[column].name)
    return plain[:1].upper() + plain[1:] + ("" if plain.endswith((".", "!", "?")) else ".")


def _script(value: Any) -> Markup:
    """JSON that may stand in a <script>: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def replace_file(path: Path, content: bytes) -> None:
    """Write whole or not at all: a reader of the page never sees half of it."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


def relative(path: str) -> str:
    """A path as short as it can be said from here; URIs stay as they are."""
    if "://" in path and not path.startswith("file://"):
        return path
    path = path.removeprefix("file://")
    found = os.path.relpath(path)
    return path if found.startswith("..") else found
