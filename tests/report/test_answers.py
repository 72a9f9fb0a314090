"""The page's interpolation, run in Chromium, says what the fitted object answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.report import report
from raysweep.report.answers import WITHIN, answer_grid, ask
from raysweep.results import published
from raysweep.results.store import Results
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import INSIDE, Recommendation
from raysweep.text import written

Drive = Callable[..., Any]
Question = tuple[str, float, float, int, int, str]

ASK = """
return POINTS.map(([architecture, params, tokens, experts, topK, group]) => {
  const entry = answers.find(architecture, `${experts}/${topK}`, group);
  const found = answers.ask(entry, params, tokens, 2);
  if (found) { delete found.entry; delete found.published; }
  return found;
});
"""


def ask_page(drive: Drive, page: Path, questions: Sequence[Question]) -> list[dict[str, Any]]:
    return drive(page, f"const POINTS = {json.dumps(questions)};" + ASK)


def questions(fits: Fits, count: int, extra: Sequence[tuple[int, int]] = ()) -> list[Question]:
    """Runs within and beyond the cells, and the cells themselves, of every architecture."""
    rng = np.random.default_rng(1)
    found: list[Question] = []
    for name in fits.architectures:
        cells = fits.cells_of(name)
        pairs = [(int(e), int(k)) for e, k in cells[["experts", "top_k"]].drop_duplicates().values]
        pairs += list(extra) if fits.kind(name) == "moe" else []
        for i in range(count):
            low, high = cells["params_active_non_embedding"].agg(["min", "max"])
            n = float(np.exp(rng.uniform(np.log(low / 8), np.log(high * 5e3))))
            low, high = cells["tokens"].agg(["min", "max"])
            d = float(np.exp(rng.uniform(np.log(low / 8), np.log(high * 5e3))))
            found.append((name, n, d, *pairs[i % len(pairs)], fits.groups(name)[-1]))
        row = cells.iloc[-1]
        size = float(row["params_active_non_embedding"]), float(row["tokens"])
        found.append((name, *size, int(row["experts"]), int(row["top_k"]), str(row["group"])))
    return found


def close(shown: float | None, told: float, rel: float, what: object) -> None:
    if math.isfinite(told):
        assert shown == pytest.approx(told, rel=rel), what
    else:
        assert shown is None, what


def check(fits: Fits, question: Question, shown: dict[str, Any]) -> Recommendation:
    name, n, d, experts, top_k, group = question
    told = fits.recommend(
        name, n, d, experts=experts, top_k=top_k, group=group or None, within=WITHIN[2]
    )
    assert isinstance(told, Recommendation)
    close(shown["rate"], told.learning_rate, 0.012, question)
    close(shown["batch_exact"], told.batch_tokens_exact, 0.01, question)
    close(shown["loss"], told.loss, 2e-3, question)
    close(shown["most"], told.largest_batch, 0.02, question)
    if math.isfinite(told.learning_rate):
        for k in range(2):
            close(shown["rate_interval"][k], told.learning_rate_interval[k], 0.03, question)
            close(shown["batch_interval"][k], told.batch_tokens_interval[k], 0.03, question)
    for k in range(2):
        close(shown["loss_interval"][k], told.loss_interval[k], 1e-2, question)
    assert shown["flops"] == pytest.approx(told.run.compute, rel=0.01)
    assert shown["total"] == pytest.approx(told.run.params_total_non_embedding, rel=0.01)
    assert (shown["verdict"] == told.verdict) or "not determined" in shown["verdict"]
    long = any(w.startswith("a long extrapolation") for w in told.warnings)
    assert shown["long"] == long, question
    assert bool(shown["reach"]) == any(abs(f - 1) > 1e-3 for f in told.extrapolation.values())
    return told


@pytest.mark.browser
def test_twenty_questions_of_a_ladder(ladder: tuple[Fits, Path], drive: Drive) -> None:
    fits, page = ladder
    asked = questions(fits, 10, extra=[(16, 2)])
    assert len(asked) >= 20
    told = [check(fits, q, s) for q, s in zip(asked, ask_page(drive, page, asked), strict=True)]
    assert {t.verdict for t in told} == {INSIDE, "extrapolated"}
    assert any("16 experts" in w for t in told for w in t.warnings)
    # The runs asked about are exact, to the digit that is written.
    (shown,) = ask_page(drive, page, [("moe", 1e9, 2e10, 8, 2, "")])
    exact = fits.recommend("moe", 1e9, 2e10)
    assert isinstance(exact, Recommendation)
    assert float(f"{shown['rate']:.3g}") == exact.learning_rate
    assert (shown["batch"], shown["sequences"]) == (exact.batch_tokens, exact.batch_sequences)
    assert shown["loss"] == pytest.approx(exact.loss, rel=1e-5)


@pytest.mark.browser
def test_one_size_names_what_the_cells_do_not_span(
    make_rows: Callable, make_results: Callable, tmp_path: Path, drive: Drive
) -> None:
    results = make_results(make_rows(("dense",), scales=1, horizons=3))
    fits = fit(results.to_pandas())
    page = report(results, tmp_path / "out", fits=fits)
    asked: list[Question] = [("dense", 2e7, 4e6, 1, 1, ""), *questions(fits, 5)]
    shown = ask_page(drive, page, asked)
    for question, found in zip(asked, shown, strict=True):
        check(fits, question, found)
    assert shown[0]["directions"] == "N"
    cell = shown[-1]
    assert cell["cell"] == fits.cells.index[-1]
    assert cell["directions"] == ""


@pytest.mark.browser
def test_an_import_of_losses_alone(shared_data: Path, tmp_path: Path, drive: Drive) -> None:
    results = Results.open(tmp_path / "results", create=True)
    results.write_many(published.read_isoflop(shared_data / "isoflop_llama3.csv"))
    fits = fit(results.to_pandas())
    page = report(results, tmp_path / "out", fits=fits)
    asked = questions(fits, 6)
    for question, found in zip(asked, ask_page(drive, page, asked), strict=True):
        told = check(fits, question, found)
        assert found["rate"] is None
        assert math.isfinite(told.loss)


@pytest.mark.browser
def test_groups_at_one_batch(
    make_rows: Callable, make_results: Callable, tmp_path: Path, drive: Drive
) -> None:
    rows = make_rows(("dense",), scales=3, trials=12)
    for k, row in enumerate(rows):
        faster = k % 2 == 1
        row["recipe"] = json.dumps({"optimizer": "muon" if faster else "adamw"})
        row |= {"batch_sequences": 64, "batch_tokens": 4096.0}
        if row["loss"] is not None and faster:
            row["loss"] *= 0.98
    results = make_results(rows)
    fits = fit(results.to_pandas(), group="optimizer")
    assert fits.groups("dense") == ["adamw", "muon"]
    page = report(results, tmp_path / "out", fits=fits)
    asked = [
        (name, n, d, e, k, group)
        for name, n, d, e, k, _ in questions(fits, 4)
        for group in ("adamw", "muon")
    ]
    shown = ask_page(drive, page, asked)
    for question, found in zip(asked, shown, strict=True):
        told = check(fits, question, found)
        assert (found["batch"], found["sequences"]) == (told.batch_tokens, told.batch_sequences)
        assert (found["batch"], found["batch_interval"]) == (4096, [None, None])
        assert any("at the batch that was run" in w for w in found["warnings"])
    surface = next(iter(fits.evidence.values())).surface
    assert surface is not None
    _, batch, loss = surface.group_effect("muon")
    assert not batch.known
    assert loss.high < 1
    assert f"×{written(loss.value, 'number')}" in page.read_text()
    # Without a group named, the page opens with the better one, as `recommend` does.
    best = fits.recommend("dense", 1e6, 2e7)
    assert isinstance(best, Recommendation)
    opened = drive(page, "return document.getElementById('ask').elements.group.value")
    assert opened == best.run.group == "muon"


@pytest.mark.browser
def test_outside_the_grid_is_said(ladder: tuple[Fits, Path], drive: Drive) -> None:
    said = drive(
        ladder[1],
        """
        const form = document.getElementById("ask"), said = [];
        for (const text of ["1e20", "7B", "1e5"]) {
          form.elements.params.value = text;
          form.elements.params.dispatchEvent(new Event("input", { bubbles: true }));
          const notice = document.getElementById("ask-problem");
          said.push(notice.hidden ? "" : notice.textContent);
        }
        return said;
        """,
    )
    assert said[0].startswith("Outside the grid of this page")
    assert said[1:] == ["", ""]


@pytest.mark.slow
def test_many_families_share_the_nodes(
    make_rows: Callable, make_results: Callable, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), scales=2, trials=24)
    for k, row in enumerate(rows):
        row["recipe"] = json.dumps({"optimizer": f"o{k % 12}"})
    results = make_results(rows)
    fits = fit(results.to_pandas(), group="optimizer")
    grid = answer_grid(fits, ask(fits, []))
    assert grid is not None
    assert len(grid["entries"]) == 12
    nodes = [math.prod(len(a) for a in e["grid"]["axes"]) for e in grid["entries"]]
    assert sum(nodes) <= 4000
    page = report(results, tmp_path / "out", fits=fits)
    assert page.stat().st_size < 3_000_000
    assert all(f">o{k}<" in page.read_text() for k in range(12))


@pytest.mark.slow
def test_asked_is_of_every_architecture_and_comes_first(ladder: tuple[Fits, Path]) -> None:
    fits = ladder[0]
    found = ask(fits, [], [("7B", "1.4T"), (1e8, 2e9)])
    sizes = [(a.run.architecture, a.run.params, a.run.tokens) for a in found]
    assert sizes == [
        ("dense", 7e9, 1.4e12),
        ("moe", 7e9, 1.4e12),
        ("dense", 1e8, 2e9),
        ("moe", 1e8, 2e9),
    ]
    with pytest.raises(UserError, match=r"1\.4T"):
        ask(fits, [], [("7B", "1,4T")])
    # Without a question: ten times the compute of the largest cell, all at one size.
    found = ask(fits, [])
    assert {(a.run.params, a.named) for a in found} == {(found[0].run.params, False)}
    largest = fits.cells_of("dense").iloc[-1]
    compute = found[0].run.params * found[0].run.tokens
    assert compute == pytest.approx(
        10 * largest["params_active_non_embedding"] * largest["tokens"], rel=0.05
    )
