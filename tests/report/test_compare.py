"""Two studies side by side: planted ratios come back, losses of different scales are left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raysweep.scaling.contrast import MATCHED, ONE_LAW, OWN_LAWS, Contrast

import raysweep
from raysweep.errors import UserError
from raysweep.report.compare import write_comparison
from raysweep.report.numbers import Numbers
from raysweep.results.schema import row_table
from raysweep.results.store import Results
from raysweep.scaling.compare import Comparison, compare, open_source, pair_of, reference_of
from raysweep.scaling.fits import Fits
from raysweep.scaling.sides import Part, Side, make_side, parts_of, why_apart

Row = dict[str, Any]
RATE, BATCH, LOSS = 1.8, 0.6, 0.99
"""The other study over the first, as planted."""


def other_study(rows: list[Row], seed: int = 1, **override: Any) -> list[Row]:
    """The same ladder with its optima and losses moved by known factors, and noise of its own."""
    rng = np.random.default_rng(seed)
    moved = []
    for k, row in enumerate(rows):
        noise = np.exp(rng.normal(0, (0.02, 0.02, 0.001)))
        moved.append(
            row
            | {
                "trial_key": f"{seed}x{k}",
                "study": "muon",
                "learning_rate": row["learning_rate"] * RATE * noise[0],
                "batch_tokens": row["batch_tokens"] * BATCH * noise[1],
                "loss": None if row["loss"] is None else row["loss"] * LOSS * noise[2],
            }
            | override
        )
    return moved


def write(folder: Path, rows: list[Row]) -> Results:
    results = Results.open(folder, create=True)
    results.write_many(row_table(rows).to_pandas())
    return results


@pytest.fixture(scope="module")
def planted(make_rows: Callable[..., list[Row]]) -> list[Row]:
    return make_rows(("dense",), scales=4, horizons=2, trials=12)


@pytest.fixture(scope="module")
def pair(planted: list[Row], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    write(folder / "adamw", [r | {"study": "adamw"} for r in planted])
    write(folder / "muon", other_study(planted))
    return folder / "adamw", folder / "muon"


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path]) -> Comparison:
    return compare(pair)


@pytest.fixture(scope="module")
def page(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(found, tmp_path_factory.mktemp("page"), png=True)


def contrast(found: Comparison, quantity: str, equal: str, how: str | None = None) -> Contrast:
    (one,) = [
        c
        for c in found.pairs[0].contrasts
        if c.quantity == quantity and c.at_equal == equal and how in (None, c.how)
    ]
    assert one.ok, one.message
    return one


def tokens_needed(params: float, tokens: float) -> float:
    """Tokens of the other study for the first's loss, by the law that `planted` rows follow."""

    def loss(d: float) -> float:
        return 1.6 + 30 / params**0.32 + 60 / d**0.34

    rest = loss(tokens) / LOSS - 1.6 - 30 / params**0.32
    return (60 / rest) ** (1 / 0.34)


@pytest.mark.parametrize(
    ("quantity", "equal", "how", "truth"),
    [
        ("learning_rate", "N and D", None, RATE),
        ("learning_rate", "FLOPs", None, RATE),
        ("batch_tokens", "N and D", None, BATCH),
        ("loss", "N and D", MATCHED, LOSS),
        ("loss", "N and D", OWN_LAWS, LOSS),
    ],
)
def test_planted_ratios_lie_in_their_intervals(
    found: Comparison, quantity: str, equal: str, how: str | None, truth: float
) -> None:
    c = contrast(found, quantity, equal, how)
    assert c.low < truth < c.high, c
    assert c.ratio == pytest.approx(truth, rel=0.15)
    if how == MATCHED:
        assert c.n == 8
        assert c.high / c.low < 1.01


@pytest.mark.parametrize("how", [ONE_LAW, OWN_LAWS])
def test_tokens_for_equal_loss(found: Comparison, how: str) -> None:
    c = contrast(found, "tokens", "loss and N", how)
    truth = tokens_needed(c.at["params"], c.at["tokens"]) / c.at["tokens"]
    assert 0.2 < truth < 0.8
    assert c.low < truth < c.high
    assert c.clear


def test_flops_for_equal_loss_follow_tokens_a_parameter(found: Comparison) -> None:
    c = contrast(found, "flops", "loss and tokens a parameter", ONE_LAW)
    n, d = c.at["params"], c.at["tokens"]

    def loss(s: float) -> float:
        return 1.6 + 30 / (n * s) ** 0.32 + 60 / (d * s) ** 0.34

    grid = np.geomspace(0.1, 1, 4000)
    s = grid[np.argmin(np.abs([loss(g) * LOSS - loss(1) for g in grid]))]
    assert c.low < s**2 < c.high
    assert c.ratio == pytest.approx(s**2, rel=0.05)


def test_sides_are_named_and_what_differs_is_said(found: Comparison) -> None:
    assert [s.label for s in found.sides] == ["adamw", "muon"]
    text = str(found)
    assert "muon over adamw" in text
    assert "not compared" not in text


def side(rows: list[Row], fits: Fits) -> Side:
    return make_side(Part("x", 0, "here", "dense", row_table(rows).to_pandas()), fits)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ({}, ""),
        ({"data_hash": "0000"}, "different corpora"),
        ({"data_hash": None}, "do not say which corpus"),
        ({"vocab_size": 50304}, ""),  # the other side does not say its own: nothing to compare
        ({"sequence_length": 128}, "different sequence lengths"),
        ({"recipe": json.dumps({"loss": "smoothed training loss"})}, "different losses"),
    ],
)
def test_whether_losses_share_a_scale(
    planted: list[Row], found: Comparison, override: Row, why: str
) -> None:
    fits = found.sides[0].fits
    said = why_apart(side(planted[:3], fits), side([r | override for r in planted[:3]], fits))
    assert (why in said) if why else not said
    mixed = [planted[0], planted[1] | {"data_hash": "0000"}]
    assert "mixes corpora" in why_apart(side(mixed, fits), side(planted[:2], fits))


def test_losses_of_different_scales_are_left_out(found: Comparison, tmp_path: Path) -> None:
    one, two = found.sides
    two = replace(two, traits=two.traits | {"data_hash": ("0000",)})
    pair = pair_of(one, two, 40, 0)
    apart = replace(found, sides=(one, two), pairs=(pair,))
    quantities = {c.quantity for c in pair.contrasts}
    assert {"learning_rate", "batch_tokens"} <= quantities
    assert not quantities & {"loss", "tokens", "flops"}
    assert not any(c.at_equal == "loss" for c in pair.contrasts)
    assert pair.cells == ()
    assert "losses are not compared: different corpora" in str(apart)
    html = write_comparison(apart, tmp_path / "page").read_text()
    assert "different scales" in html
    assert 'id="figure-loss"' not in html


def labels(sources: list[Results | str], architectures: tuple[str, ...] = ()) -> list[str]:
    return [part.label for part in parts_of([open_source(s) for s in sources], architectures)]


def test_studies_and_architectures_of_one_folder(
    planted: list[Row], make_rows: Callable[..., list[Row]], tmp_path: Path
) -> None:
    both = write(tmp_path / "both", planted + other_study(planted))
    mixed = write(tmp_path / "mixed", make_rows())
    assert labels([both]) == ["ladder", "muon"]
    assert labels([f"{both.uri}#muon", f"{both.uri}#ladder"]) == ["muon", "ladder"]
    assert labels([mixed]) == ["dense", "moe"]
    assert labels([mixed, both]) == ["mixed dense", "mixed moe", "both dense"]
    assert labels([mixed, both], ("dense",)) == ["mixed", "both"]
    assert labels([both, both]) == ["both", "both (2)"]


def test_each_architecture_meets_its_own_in_the_first_results(found: Comparison) -> None:
    def one(label: str, origin: int, architecture: str) -> Side:
        return replace(found.sides[0], label=label, origin=origin, architecture=architecture)

    sides = [one("a", 0, "dense"), one("b", 0, "moe"), one("c", 1, "dense"), one("d", 1, "moe"),
             one("e", 1, "other")]  # fmt: skip
    met = [reference_of(sides, k).label for k in range(1, 5)]
    assert met == ["a", "a", "b", "a"]


def test_what_cannot_be_compared_is_a_users_mistake(
    planted: list[Row], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = write(tmp_path / "alone", planted)
    with pytest.raises(UserError, match="needs two sides"):
        compare([alone])
    with pytest.raises(UserError, match=r"no study 'x' in .*; its studies: adamw"):
        compare([f"{pair[0]}#x", pair[1]])
    with pytest.raises(UserError, match=r"no architecture 'moe'.*known: dense"):
        compare(pair, architectures=["moe"])
    with pytest.raises(UserError, match="at most 6"):
        compare([pair[0]] * 7)


def test_studies_that_have_little_or_nothing(planted: list[Row], tmp_path: Path) -> None:
    lost = [
        r | {"status": "diverged", "loss": None, "trial_key": f"l{k}"}
        for k, r in enumerate(planted[:20])
    ]
    few = [r | {"trial_key": f"f{k}"} for k, r in enumerate(planted) if r["scale"] == "s0"]
    some = [r for r in planted if r["scale"] in ("s0", "s1")]
    sides = [
        write(tmp_path / "a", some),
        write(tmp_path / "lost", lost),
        write(tmp_path / "few", few),
    ]
    found = compare(sides, n_boot=40)
    assert all(not c.ok for c in found.pairs[0].contrasts)
    page = write_comparison(found, tmp_path / "page")
    assert "lost" in page.read_text()
    assert str(found)


def test_numbers_of_the_page_equal_the_json(found: Comparison, page: Path) -> None:
    html = page.read_text()
    data = json.loads(json.dumps(found.to_dict()))
    marked = re.findall(r'data-key="([^"]+)">([^<]+)<', html)
    assert len(marked) > 60
    for key, text in marked:
        parts = [p.replace("~1", "/").replace("~0", "~") for p in key.split("/")[1:]]
        value = Numbers(data).at(*parts)
        assert isinstance(value, int | float), key
        letters = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
        plain = text.replace("\N{MINUS SIGN}", "-").replace("\N{NARROW NO-BREAK SPACE}", "")
        percent = plain.endswith("%")
        plain = plain.removesuffix("%").strip("\N{NO-BREAK SPACE}+ ")
        shown = float(plain.rstrip("kMBT")) * letters.get(plain[-1], 1) / (100 if percent else 1)
        assert math.isclose(shown, value, rel_tol=0.06, abs_tol=5e-4), (key, text, value)
    assert {"ratios.png", "optima.png", "loss.png", "gaps.png"} <= {
        p.name for p in page.parent.iterdir()
    }
    assert "http://" not in re.sub(r"http://www.w3.org/\S+", "", html)


def test_command_line(
    pair: tuple[Path, Path], found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from raysweep.cli import app

    asked = []
    monkeypatch.setattr(
        "raysweep.scaling.compare.compare", lambda *a, **k: asked.append((a, k)) or found
    )
    out = tmp_path / "page"
    done = CliRunner().invoke(app, ["compare", *map(str, pair), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert asked == [(([str(p) for p in pair],), {"architectures": ()})]
    assert "muon over adamw" in done.output
    assert (out / "index.html").exists()


def test_public_api(found: Comparison) -> None:
    assert raysweep.compare is compare
    assert raysweep.write_comparison is write_comparison
    assert json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_page_in_a_browser(page: Path, drive: Callable[..., Any]) -> None:
    seen = drive(
        page,
        """
        const saved = [];
        URL.createObjectURL = (blob) => { saved.push(blob); return "#saved"; };
        for (const button of document.querySelectorAll("[data-csv]")) button.click();
        const texts = await Promise.all(saved.map((b) => b.text()));
        const point = document.querySelector("#figure-gaps svg title").parentNode;
        point.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        const tip = document.getElementById("tip");
        return { texts, tip: tip.hidden ? null : tip.textContent };
        """,
    )
    assert len(seen["texts"]) == 4
    assert all(len(t.splitlines()) > 4 for t in seen["texts"])
    assert "FLOPs" in seen["tip"]
