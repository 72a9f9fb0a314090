"""Lines of the product by package: code, comments with docstrings, blank lines, files.

python -m benchmarks.size [FOLDER]
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

PRODUCT = Path(__file__).resolve().parent.parent / "raysweep"
SUFFIXES = (".py", ".js", ".html", ".css")
_BLOCK = re.compile(r"/\*.*?\*/|<!--.*?-->|\{#.*?#\}", re.DOTALL)


def count(path: Path) -> Counter[str]:
    """Lines of one file as `code`, `comment` and `blank`; a line with both counts as code."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    prose = _prose_of_python(text) if path.suffix == ".py" else _prose_of_page(text)
    kinds = Counter(
        "blank" if not line.strip() else "comment" if number in prose else "code"
        for number, line in enumerate(lines, 1)
    )
    kinds.update(files=1, lines=len(lines))
    return kinds


def _prose_of_python(text: str) -> set[int]:
    """Numbers of the lines that hold only a comment, or a string that is a statement."""
    found = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def _prose_of_page(text: str) -> set[int]:
    """The same of JavaScript, CSS and templates: lines within comments that begin theirs."""
    found = {n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith("//")}
    for match in _BLOCK.finditer(text):
        first = text.count("\n", 0, match.start()) + 1
        begins = not text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
        found |= set(range(first + (not begins), first + match.group().count("\n") + 1))
    return found


def by_package(folder: Path) -> dict[str, Counter[str]]:
    """Counts by package below a folder; its own modules under its name."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        inside = path.relative_to(folder).parts
        name = inside[0] if len(inside) > 1 else folder.name
        found.setdefault(name, Counter()).update(count(path))
    return found


def table(found: dict[str, Counter[str]]) -> str:
    """A line a package, the largest first, and the sum."""
    columns = ("lines", "code", "comment", "blank", "files")
    rows = sorted(found.items(), key=lambda item: -item[1]["lines"])
    rows.append(("all", sum(found.values(), Counter())))
    head = f"{'':<12}" + "".join(f"{name:>9}" for name in columns)
    return "\n".join(
        [head, *(f"{n:<12}" + "".join(f"{c[k]:9,}" for k in columns) for n, c in rows)]
    )


if __name__ == "__main__":
    print(table(by_package(Path(sys.argv[1]) if sys.argv[1:] else PRODUCT)))
