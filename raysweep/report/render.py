"""From a template and what it says to a file: HTML, scripts inlined, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raysweep.report.style import DARK, LIGHT
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


def sentence(text: str) -> str:
    """Words as a sentence: a capital first, a full stop last."""
    plain = text.strip().replace("learning_rate", "learning rate").replace("batch_tokens", "batch")
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
