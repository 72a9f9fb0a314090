"""Search-space files nobody meant: each is a valid study, or one error of one line."""

import contextlib
import copy
import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysweep.errors import UserError
from raysweep.results.mapping import parse_mapping
from raysweep.study import Study
from raysweep.study.plan import make_plan
from raysweep.study.schema import SearchSpace

REPO = Path(__file__).resolve().parents[2]
FILES = int(os.environ.get("RAYSWEEP_FUZZ", "0"))
"""Files to try, at random; without it a few hundred, always the same."""
SECONDS = 3.0
"""Of CPU time that no file may take."""

fuzz = settings(
    max_examples=FILES or 150,
    derandomize=not FILES,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 64, 10**6, 10**18, 10**18 + 1, 2**63, 10**400, -(10**30)),
    *(0.0, -0.0, 0.5, 1e-320, 1e-9, 1e9, 1e15, 1e18, 1e30, 1e300, 1.7e308),
    *(float("inf"), float("-inf"), float("nan"), "1e30", "1e999", "nan", "0x10", "1_000", "20e6"),
    *("", " ", "x", "../x", "/etc/passwd", "a/b", "con", "CON.txt", ".", "..", "-", "~", "$HOME"),
    *("naïve", "数", "\u202egnp", "a\nb", "a\rb", "a\x00b", "a\x1b[2Jb", "<script>", "x" * 5000),
    *("matched", "bytes", "machine", "tokens", "ladder", "grid", "dense", "moe", "{{7*7}}", "%s"),
    *([], {}, [[]], [None], {"a": {}}, {"": 1}, [1, 2], {"params": 1e9}, {"tokens": 1e9}),
)
TEXTS = (
    b"\t",
    b"\x00",
    b"\xff\xfe",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"\r",
    b"\x85",
    b"---\n",
    b"...\n",
    b"&a [*a, *a]\n",
    b"? {a: b}\n",
    b"? [1, 2]\n: 3\n",
    b"<<: {study: x}\n",
    b"!!python/object/apply:os.system [true]\n",
    b"!!binary aGk=\n",
    b"!!set {a, b}\n",
    b"!!timestamp 2001-99-99\n",
    b"%YAML 9.9\n",
    b"@",
    b"`",
    b"{",
    b"]",
    b": ",
    b"- ",
    b"|",
    b"'",
    b'"',
    b"#",
    b"2001-13-45",
    b"1:99:99",
    b"0b2",
    b"." * 50,
    b"[" * 3000,
    b"{a: " * 600,
    b"9" * 5000,
    b"\\x00",
)


@functools.cache
def whole_files() -> tuple[Any, ...]:
    """The shipped files as values, and again with every key that a file may have."""
    found: list[Any] = []
    for path in sorted((REPO / "search_spaces").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        found += [values, SearchSpace.model_validate(values).model_dump(mode="json")]
    return tuple(found)


def places(values: Any, at: tuple = ()) -> list[tuple]:
    """Where values stand, outermost first."""
    if not isinstance(values, dict | list):
        return [at]
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    return [at, *(p for key, value in inner for p in places(value, (*at, key)))]


def mutate(draw: Any, values: Any) -> Any:
    """One change to a tree of values."""
    found = places(values)
    at = draw(st.sampled_from(found))
    if not at:
        return copy.deepcopy(draw(st.sampled_from([values, values, values, *SCALARS])))
    holder = functools.reduce(lambda inside, key: inside[key], at[:-1], values)
    key, other = at[-1], draw(st.sampled_from(found))
    change = draw(st.sampled_from(["scalar", "scalar", "swap", "rename", "drop", "wrap", "many"]))
    if change == "scalar":
        holder[key] = copy.deepcopy(draw(st.sampled_from(SCALARS)))
    elif change == "swap":
        holder[key] = copy.deepcopy(functools.reduce(lambda v, k: v[k], other, values))
    elif change == "drop":
        del holder[key]
    elif change == "wrap":
        for _ in range(draw(st.sampled_from([1, 2, 30]))):
            holder[key] = [holder[key]] if draw(st.booleans()) else {"a": holder[key]}
    elif change == "rename" and isinstance(holder, dict):
        new = draw(st.sampled_from([*SCALARS[:34], *map(str, other), f"{key}s"]))
        holder[new if isinstance(new, str | int | float | None) else "x"] = holder.pop(key)
    elif change == "many" and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder[key]) for _ in range(draw(st.sampled_from([1, 50]))))
    return values


def spoil(draw: Any, text: bytes) -> bytes:
    """One change to the bytes of a file."""
    start = draw(st.integers(0, len(text)))
    stop = min(len(text), start + draw(st.sampled_from([0, 1, 5, 200])))
    change = draw(st.sampled_from(["insert", "cut", "twice", "line", "tail"]))
    if change == "insert":
        return text[:start] + draw(st.sampled_from(TEXTS)) + text[stop:]
    if change == "cut":
        return text[:start] + text[stop:]
    if change == "twice":
        return text[:stop] + text[start:]
    lines = text.splitlines(keepends=True)
    if change == "line" and lines:
        lines.insert(start % len(lines), lines[stop % len(lines)])
        return b"".join(lines)
    return text + draw(st.binary(max_size=8))


@st.composite
def search_space_files(draw: Any) -> bytes:
    values = copy.deepcopy(draw(st.sampled_from(whole_files())))
    for _ in range(draw(st.integers(0, 3))):
        if not isinstance(values, dict | list) or not values:
            break
        values = mutate(draw, values)
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False).encode(
        "utf-8", "surrogatepass"
    )
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        text = spoil(draw, text)
    return text


def study_or_one_line(path: Path, overrides: list[str]) -> Study | None:
    begun = time.process_time()
    try:
        study = Study.load(path, overrides)
        make_plan(study).to_dict()
    except UserError as error:
        said = str(error)
        assert said.isprintable(), repr(said)
        assert len(said) < 1000, len(said)
        study = None
    assert time.process_time() - begun < SECONDS
    return study


@pytest.mark.slow
@fuzz
@given(search_space_files())
def test_any_file_is_a_study_or_one_clear_line(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.yaml"
        path.write_bytes(text)
        study = study_or_one_line(path, [])
    if study is not None:
        assert study.cells
        for name in (study.name, *(cell.name for cell in study.cells)):
            assert Path(name).name == name, "leaves the results folder"


@pytest.mark.slow
@fuzz
@given(st.data())
def test_any_override_is_a_study_or_one_clear_line(data: st.DataObject) -> None:
    path = REPO / "search_spaces" / "smoke.yaml"
    keys = [".".join(map(str, at)) for values in whole_files()[-4:] for at in places(values) if at]
    overrides = []
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(keys) | st.text(max_size=12))
        values = st.sampled_from(SCALARS).map(repr) | st.text(max_size=12)
        texts = st.sampled_from(TEXTS).map(lambda t: t.decode("utf-8", "replace"))
        overrides.append(f"{key}={data.draw(values | texts)}")
    study_or_one_line(path, overrides)


@fuzz
@given(st.lists(st.text(max_size=30) | st.sampled_from(["loss=x", "a==", "=b", ",,", "loss==="])))
def test_any_mapping_is_read_or_one_clear_line(texts: list[str]) -> None:
    with contextlib.suppress(UserError):  # whose message is one line, whatever it quotes
        assert all(key and value for key, value in parse_mapping(texts).items())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x00" * 100,
        b"\xff" * 100,
        b"[" * 45_000,
        b"{" * 45_000,
        b"- " * 22_000,
        b"? " * 22_000,
        b"a: " * 15_000,
        b"9" * 45_000,
        b"!" * 45_000,
        b"'" * 45_000,
        b"\n".join(b"k%d: 1" % i for i in range(4_000)),
        b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        b"study: x\nscales: [" + b"{params: 1e9}," * 3_000 + b"]\nhorizons: [{tokens: 1e9}]",
        b"study: x\nhorizons: [{tokens: 1e9}]\nscales: [{params: 1e30}]",
        b"study: x\nhorizons: [{tokens: 1e9}]\nscales: [{params: 1e9}]\nmodel: {head_dim: 2, "
        b"aspect_ratio: 1e-3}",
    ],
    ids=range(16),
)
def test_a_file_that_means_harm_is_one_clear_line_and_soon(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(text)
    assert study_or_one_line(path, []) is None
