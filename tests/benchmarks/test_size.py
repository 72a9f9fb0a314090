"""Lines of code are told from prose and blank lines, in each of the product's languages."""

from pathlib import Path

import pytest

from benchmarks.size import by_package, count, table


@pytest.mark.parametrize(
    ("name", "text", "code", "comment", "blank"),
    [
        ("a.py", '"""Doc.\n\nMore."""\n\n# why\nx = 1  # one\n"""What x is."""\n', 1, 4, 2),
        ("a.py", 'text = """\n# no comment\n"""\n', 3, 0, 0),
        ("a.js", "// why\nf(); // one\n/* two\n   lines */\n\ng();\n", 2, 3, 1),
        ("a.html", "<p> <!-- a\nb -->\n{# c #}\n</p>\n", 2, 2, 0),
        ("a.css", "/* a */\nb { c: d; }\n", 1, 1, 0),
    ],
)
def test_lines(tmp_path: Path, name: str, text: str, code: int, comment: int, blank: int) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = count(path)
    assert (found["code"], found["comment"], found["blank"]) == (code, comment, blank)


def test_packages_add_up(tmp_path: Path) -> None:
    (tmp_path / "one" / "deep").mkdir(parents=True)
    for place in ("top.py", "one/a.py", "one/deep/b.js", "one/data.json"):
        (tmp_path / place).write_text("f()\n\n")
    found = by_package(tmp_path)
    assert {name: c["files"] for name, c in found.items()} == {tmp_path.name: 1, "one": 2}
    assert table(found).splitlines()[-1].split() == ["all", "6", "3", "0", "3", "3"]
