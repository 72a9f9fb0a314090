"""Numbers with units: written as people say them, read as people write them, one way each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raysweep.errors import UserError
from raysweep.scaling.estimate import Estimate
from raysweep.study import Study
from raysweep.study.schema import SearchSpace
from raysweep.text import (
    NOTHING,
    STYLES,
    dollars,
    duration,
    estimated,
    read_number,
    read_size,
    scientific,
    short,
    size,
    written,
)

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(16384, "16.4k"), (999_600, "1M"), (7e9, "7B"), (1.4e12, "1.4T"), (64, "64"), (0.5, "0.5")],
)
def test_counts(value: float, expected: str) -> None:
    assert short(value) == expected


def test_trailing_zeros_only_where_digits_matter() -> None:
    assert [short(v, 2) for v in (5.24, 99.6, 184.7, 184_700)] == ["5.2", "100", "180", "180k"]
    assert short(4700, full=True) == "4.70k"
    assert short(393_000, full=True) == "393k"
    assert scientific(5.2e-4) == "5.2e-4"
    assert scientific(5.2e-4, full=True) == "5.20e-4"
    assert scientific(0.013, full=True) == "0.0130"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0.0, "0s"), (0.04, "0.04s"), (0.94, "0.9s"), (0.97, "1s"), (42.4, "42s")),
        *((59.6, "1m 00s"), (150, "2m 30s"), (3599.7, "1h 00m"), (7800, "2h 10m")),
        *((47.99 * 3600, "47h 59m"), (48 * 3600, "2d 0h"), (3e5, "3d 11h")),
        *((239.6 * 3600, "10d"), (1e6, "12d"), (math.nan, NOTHING)),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (640, "640 bytes"), (999_900, "1 MB"), (1_234, "1.23 kB"), (141e9, "141 GB")],
)
def test_bytes(count: float, words: str) -> None:
    assert size(count) == words


def test_dollars() -> None:
    assert [dollars(v) for v in (0.0123, 2.5, 999, 1.2e6)] == [
        "$0.0123",
        "$2.50",
        "$999.00",
        "$1.2M",
    ]


def test_what_is_not_a_number_is_a_dash() -> None:
    for value in (None, math.nan, math.inf):
        assert all(written(value, style) == NOTHING for style in STYLES)


def test_intervals() -> None:
    assert estimated(1.2, 1.1, 1.3, style="number") == "1.2 (95 %: 1.1 to 1.3)"
    assert estimated(Estimate(1.2, 1.1, 1.3), style="ratio") == "1.20 (95 %: 1.10 to 1.30)"
    assert estimated(5e5, style="batch", unit="tokens") == "500k tokens (no interval)"
    assert estimated(Estimate.missing("too few cells"), style="loss") == "unknown"


@given(st.floats(1e-6, 1e24))
def test_what_is_written_reads_back(value: float) -> None:
    assert read_number(scientific(value, 4)) == pytest.approx(value, rel=1e-3)
    for style in ("rate", "flops", "coefficient", "tokens", "params", "batch"):
        assert read_number(written(value, style)) == pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("20B", 20e9), ("1.4T", 1.4e12), ("7b", 7e9), ("3.3m", 3.3e6), ("16k", 16e3)),
        *(("1e9", 1e9), ("1E3", 1e3), ("5e-4", 5e-4), (".5", 0.5), ("7.", 7.0), ("7 B", 7e9)),
        *(("1,400,000", 1.4e6), ("1_400_000", 1.4e6), ("1,400", 1400.0), ("1,400.5", 1400.5)),
        *((" 12 ", 12.0), ("-2", -2.0), (12, 12.0), (1.5, 1.5)),
    ],
)
def test_numbers_are_read(text: str | float, value: float) -> None:
    assert read_number(text) == value


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        *(("1,4T", "write 1.4T"), ("1,4", "write 1.4"), ("1,400B", "write 1.400B")),
        *((t, "write 7e9 or 7B") for t in ("", "seven", "7Q", "1.2.3", "B", "nan", "1_4", "0x10")),
        *((t, "write 7e9 or 7B") for t in ("1,40,000", "1e", "--2", "7BB", "1.400.000", "٣")),
        *(("1e999", "too large"), (10**400, "too large")),
    ],
)
def test_what_is_no_number_is_told_how_to_write_it(text: str | float, mend: str) -> None:
    with pytest.raises(UserError, match=mend):
        read_number(text)


def test_a_size_without_its_letter_is_asked_about() -> None:
    assert read_size("7B", "params") == 7e9
    assert math.isnan(read_size(math.nan))
    for given_, what, mend in (
        *(("7", "params", "params 7: did you mean 7B?"), (20.0, "tokens", "did you mean 20B?")),
        ("1.4", "tokens", "tokens 1.4: did you mean 1.4T?"),
    ):
        with pytest.raises(UserError) as caught:
            read_size(given_, what)
        assert mend in str(caught.value)


# --- in the search-space file ------------------------------------------------------------------

SPACE = """
study: a
scales: [{params: 1.5M}, {params: '2_000_000'}]
horizons: [{tokens: 20M}, {tokens: 1e8}, {tokens: '400,000'}]
data: {validation_sequences: 1e1}
targets: [{architecture: dense, params: 7B, tokens: 1.4T}]
"""


def test_file_takes_what_people_write_and_so_does_its_schema() -> None:
    values = yaml.safe_load(SPACE)
    space = SearchSpace.model_validate(values)
    assert [s.params for s in space.scales] == [1.5e6, 2e6]
    assert [h.tokens for h in space.horizons] == [20e6, 1e8, 4e5]
    assert space.data.validation_sequences == 10
    assert (space.targets[0].params, space.targets[0].tokens) == (7e9, 1.4e12)
    schema = json.loads((REPO / "search_spaces/schema.json").read_text())
    jsonschema.validate(values, schema)
    for wrong in ({"tokens": "1,4T"}, {"tokens": "many"}, {"tokens": -1}, {"tokens": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, "horizons": [wrong]}, schema)


@pytest.mark.parametrize("path", sorted((REPO / "search_spaces").glob("*.yaml")), ids=str)
def test_schema_takes_the_shipped_files(path: Path) -> None:
    schema = json.loads((REPO / "search_spaces/schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("20M", "'1,4T'", "write 1.4T"), ("params: 7B", "params: 7", "did you mean 7B?")],
)
def test_file_says_where_a_number_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(SPACE.replace(old, new))
    with pytest.raises(UserError) as caught:
        Study.load(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}:")
