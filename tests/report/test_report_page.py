"""The page: whole, self-contained, honest about what is missing, its numbers those of the fits."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raysweep.report import report
from raysweep.report.numbers import Numbers
from raysweep.results import importers
from raysweep.results.store import Results
from raysweep.scaling.compute.roofline import find_gpu
from raysweep.scaling.compute.serving import Serving, serving_dict
from raysweep.scaling.fits import fit

LARGEST = 3_000_000


class Page(HTMLParser):
    """A page taken apart: its ids, links, marked numbers and JSON."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.numbers: list[tuple[str, str]] = []
        self.json: dict[str, Any] = {}
        self.words: list[str] = []
        self._key: str | None = None
        self._json: str | None = None
        self._quiet = False
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.links += [str(given[a]) for a in ("href", "src", "action") if given.get(a)]
        self._key = given.get("data-key") if tag == "span" else None
        self._json = given.get("id") if given.get("type") == "application/json" else None
        self._quiet = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._key = self._json = None
        self._quiet = False

    def handle_data(self, data: str) -> None:
        if self._key is not None:
            self.numbers.append((self._key, data))
        if self._json is not None:
            self.json[self._json] = json.loads(data)
        if not self._quiet:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read_number(text: str) -> float:
    """What a reader would take a written number for."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{NARROW NO-BREAK SPACE}", "")
    text = text.replace("\N{NO-BREAK SPACE}", "").replace(" ", "")
    scale = 1.0
    for letter, value in {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "%": 1e-2}.items():
        if text.endswith(letter):
            text, scale = text[: -len(letter)], value
    return float(text) * scale


def half_digit(text: str) -> float:
    """How far a number may lie from what is written: half of the last digit's worth."""
    number = text.replace("\N{NO-BREAK SPACE}", "").rstrip("TBMk%").partition("e")[0]
    decimals = len(number.partition(".")[2])
    one = read_number("1" + text[text.index("e") :] if "e" in text else "1" + text[len(number) :])
    trailing = len(number) - len(number.rstrip("0")) if "." not in number else 0
    return 0.505 * one * 10.0 ** (trailing - decimals)


def places(key: str) -> list[str]:
    """The parts of a JSON pointer."""
    return [p.replace("~1", "/").replace("~0", "~") for p in key.split("/")[1:]]


def compare_numbers(page: Page, data: dict[str, Any]) -> Counter[str]:
    """Hold every marked number of a page to `data`, but for answers; returns how many of what."""
    compared: Counter[str] = Counter()
    for key, text in page.numbers:
        parts = places(key)
        if parts[0] == "answers":
            continue  # compared with `recommend` below
        value = Numbers(data).at(*parts)
        assert isinstance(value, int | float), key
        assert read_number(text) == pytest.approx(value, rel=1e-12, abs=half_digit(text)), key
        compared[parts[0]] += 1
    return compared


def test_page_is_whole_and_needs_nothing_else(ladder: tuple[Results, Path]) -> None:
    page = Page(ladder[1])
    assert len(page.source.encode()) < LARGEST
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert "link" not in page.tags or page.source.count("<link") == 1  # the empty icon
    assert len(page.ids) == len(set(page.ids))
    sections = {"answer", "surfaces", "laws", "loss", "budgets", "comparison", "serving", "checks"}
    assert sections | {"cells", "trials"} <= set(page.ids)
    drawn = {i.removeprefix("figure-") for i in page.ids if i.startswith("figure-")}
    assert drawn >= {"optima", "loss", "comparison", "noise", "load", "heldout"}
    assert drawn == set(page.json["data-csv"])
    assert all(text.count("\n") > 1 for text in page.json["data-csv"].values())
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
    assert "workers 91" in page.text
    assert "raysweep report" in page.text


def test_answers_stand_first_and_side_by_side(ladder: tuple[Results, Path]) -> None:
    results, path = ladder
    page = Page(path)
    fits = fit(results)
    for i, name in enumerate(("dense", "moe")):
        answer = fits.recommend(name, 1e9, 2e10)
        shown = dict(page.numbers)
        assert read_number(shown[f"/answers/{i}/learning_rate"]) == pytest.approx(
            answer.learning_rate, rel=5e-3
        )
        assert read_number(shown[f"/answers/{i}/batch_tokens"]) == pytest.approx(
            answer.batch_tokens, rel=5e-3
        )
        assert read_number(shown[f"/answers/{i}/loss"]) == pytest.approx(answer.loss, abs=5e-5)
    assert page.source.index("/answers/1/loss") < page.source.index('id="surfaces"')


def test_every_number_is_that_of_the_fits(ladder: tuple[Results, Path]) -> None:
    results, path = ladder
    page = Page(path)
    compared = compare_numbers(page, fit(results).to_dict())
    assert sum(compared.values()) > 300
    assert set(compared) == {
        "allocation",
        "cells",
        "comparison",
        "efficiency",
        "groups",
        "sensitivity",
    }


def test_readings_are_written_from_the_fits(ladder: tuple[Results, Path]) -> None:
    results, path = ladder
    fits, text = fit(results), Page(path).text
    assert "dense : no law of the loss could be tried" in text
    load = fits.expert_load["expert_load_max_over_mean"]
    assert f"takes {load.min():.2f} to {load.max():.2f} times its even share" in text
    assert fits.efficiency["moe"].ok
    assert "What the experts of moe save cannot be told" not in text
    assert "The fits do not support an answer" in text  # of what serving costs
    moved = fits.sensitivity["dense"]["batch_tokens"].variants
    worst = max(
        (v for v in moved[1:] if math.isfinite(v.at.value)),
        key=lambda v: abs(math.log(v.at.value / moved[0].at.value)),
    )
    assert worst.name in text


def test_text_of_rows_is_inert(make_rows: Callable, make_results: Callable, tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    rows = make_rows(("dense",), 2, trials=9)
    for row in rows:
        row |= {"cell": row["cell"] + evil, "architecture": "dense" + evil, "device": evil}
        row |= {"reason": evil if row["reason"] else None, "study": "ladder"}
    space = f"study: ladder\ndescription: {json.dumps(evil)}\n"
    page = Page(report(make_results(rows, space=space), tmp_path / "out"))
    assert "img" not in page.tags
    assert page.tags.count("script") == page.source.count("<script")
    assert "alert(1)</script>" not in page.source
    assert evil in "".join(page.words)  # shown as text


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "one architecture": ({"architectures": ("dense",)}, "What to run"),
    "one scale": ({"scales": 1}, "No law to answer with yet"),
    "one cell": ({"architectures": ("dense",), "scales": 1}, "No law to answer with yet"),
    "one trial": ({"architectures": ("moe",), "scales": 1, "trials": 1}, "too few"),
    "no finished trial": (
        {"status": "stopped", "loss": None, "reason": "stopped by hand"},
        "nothing to recommend yet",
    ),
    "only failures": (
        {"status": "diverged", "loss": None, "reason": "the loss is not finite"},
        "nothing to recommend yet",
    ),
    "only crashes without a setting": (
        {"status": "crashed", "loss": None, "learning_rate": None, "batch_tokens": None},
        "no reason recorded",
    ),
    "no learning rates": (
        {"learning_rate": None, "batch_tokens": None, "batch_sequences": None},
        "only laws of the loss are fitted",
    ),
    "several horizons": ({"architectures": ("dense",), "scales": 3, "horizons": 2}, "D/N"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_page_for_every_state(
    case: str, make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    shape, expected = CASES[case]
    page = Page(report(make_results(make_rows(**shape)), tmp_path / "out"))
    assert expected in page.text
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in page.text.lower().replace("finance", "").split()
    assert "None" not in page.text


def test_no_calculator_where_nothing_can_answer(
    make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 1, trials=4)
    page = Page(report(make_results(rows), tmp_path / "out"))
    assert "calculator" not in page.ids
    assert page.json["data-calculator"] is None


def test_a_page_for_an_empty_folder(make_results: Callable, tmp_path: Path) -> None:
    page = Page(report(make_results([]), tmp_path / "out"))
    assert "No results yet" in page.text
    assert "nothing to recommend yet" in page.text


def test_two_hundred_cells_fit_in_a_page(
    make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 50, horizons=4, trials=2)
    page = Page(report(make_results(rows), tmp_path / "out"))
    assert len(page.source.encode()) < LARGEST
    assert "36 of 200 cells are drawn" in page.text
    assert page.json["data-trials"]["shown"] == 400


def test_unreadable_search_space_does_not_stop_the_page(
    make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 1, trials=3)
    for i, space in enumerate(("targets: [{architecture: dense}", "- 1", "targets: {a: 1}")):
        results = make_results(rows, space=space)
        assert "What to run" in Page(report(results, tmp_path / f"out{i}")).text


def test_published_sweep(shared_data: Path, tmp_path: Path) -> None:
    results = Results.open(tmp_path / "results", create=True)
    results.write_many(importers.read_chinchilla(shared_data / "chinchilla_points.csv"))
    page = Page(report(results, tmp_path / "out"))
    assert len(page.source.encode()) < LARGEST
    assert "o trial tells its learning rate and batch" in page.text


def test_serving_is_that_of_the_command(
    make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    rows = make_rows(("dense", "moe"), 3, 2, trials=5, smallest=2e7)
    space = "study: s\ntargets: [{architecture: moe, params: 3e9, tokens: 6e10}]"
    results = make_results(rows, space=space)
    fits = fit(results, n_boot=5)
    page = Page(report(results, tmp_path / "out", fits=fits))
    serving = Serving(find_gpu("h100"), 1.0)
    flops = float(page.json["data-csv"]["serving"].splitlines()[1].split(",")[7])
    told = serving_dict(fits.serve(flops, serving), serving, flops)
    compared = compare_numbers(page, fits.to_dict() | {"serving": told})
    assert compared["serving"] > 50
    assert compared["efficiency"] > 4
    assert "multiply by your price" in page.text


def test_budgets_that_were_held_have_parabolas(
    make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 6, trials=3)
    held = []
    for k, budget in enumerate((1e14, 1e15, 1e16)):
        for row in rows[::3]:
            params = row["params_active_non_embedding"]
            tokens = budget / 6 / params
            loss = 1.6 + 30 / params**0.32 + 60 / tokens**0.34
            name = f"{row['scale']}-{k}"
            held.append(
                row
                | {"cell": name, "trial_key": name, "tokens": tokens, "loss": loss, "flops": budget}
                | {"flops_per_token": 6 * params, "learning_rate": None, "batch_tokens": None}
            )
    results = make_results(held)
    fits = fit(results, n_boot=40)
    page = Page(report(results, tmp_path / "out", fits=fits))
    assert compare_numbers(page, fits.to_dict())["allocation"] > 5
    rows_of = page.json["data-csv"]["budgets"].splitlines()
    assert sum(line.startswith("parabola,") for line in rows_of) == 3
    assert sum(line.startswith("run,") for line in rows_of) == len(held)
    assert "prefer the law" in page.text
    group = fits.groups["dense"]
    unseen = group.loss_checks[group.loss_order()[0]].unseen
    inside = sum(u.low <= u.observed <= u.high for u in unseen)
    assert f"{inside} of {len(unseen)} lie inside the 95 % interval" in page.text
    assert "a longer extrapolation is not supported" in page.text
    assert "not measurements" not in page.text


@pytest.mark.parametrize("times_tokens", [1.0, 0.01])
def test_a_split_outside_the_cells_is_hollow_and_said(
    make_rows: Callable, make_results: Callable, tmp_path: Path, times_tokens: float
) -> None:
    """The best run has about 16 tokens a parameter: cells of 20 come near, cells of 0.2 do not."""
    rows = make_rows(("dense",), 4, 2, trials=5, smallest=2e6)
    for row in rows:
        row["tokens"] *= times_tokens
        row["flops"] *= times_tokens
        if row["loss"] is not None:
            n, d = row["params_active_non_embedding"], row["tokens"]
            row["loss"] = 1.6 + 300 / n**0.34 + 400 / d**0.3
    results = make_results(rows)
    fits = fit(results, n_boot=5)
    page = Page(report(results, tmp_path / "out", fits=fits))
    best = fits.allocation["dense"].optimum
    assert best is not None
    assert compare_numbers(page, fits.to_dict())["allocation"] > 5
    marks = re.findall(
        r"fill: var\(--(\w+)\);[^>]*><title>best of [^<]*\((\w+) the cells\)", page.source
    )
    assert len(marks) == 4
    assert all((fill == "paper") == (where == "outside") for fill, where in marks)
    said = "At the largest cell's budget the best split lies outside the cells"
    if times_tokens == 1:
        assert best.status == "interior"
        assert {where for _, where in marks} == {"inside"}
        assert said not in page.text
        assert "the largest tried" not in str(fits)
    else:
        assert marks[-1][1] == "outside"
        assert said in page.text
        factor = best.extrapolation["tokens"]
        assert f"D {factor:.2f} × the largest tried" in page.text
        assert f"D is {factor:.3g} times the largest tried" in str(fits)


def test_an_interval_that_tells_nothing_is_said() -> None:
    numbers = Numbers({"low": 1e-44, "high": 3e6, "near": 2e6})
    assert numbers.interval("params", ["low"], ["high"]) == "not determined"
    assert "to" in numbers.interval("params", ["near"], ["high"])
