"""The page: whole, self-contained, never a crash, its numbers those of the fitted object."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysweep.errors import UserError
from raysweep.report import budgets, report, trust
from raysweep.report.answers import ask
from raysweep.report.laws import law_figures, law_rows
from raysweep.report.page import LARGEST
from raysweep.results import published
from raysweep.results.store import Results
from raysweep.scaling.compute.roofline import find_gpu
from raysweep.scaling.compute.serving import Serving
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import Recommendation
from raysweep.text import between, dollars, written

Make = Callable[..., Any]


def test_page_is_whole_and_needs_nothing_else(ladder: tuple[Fits, Path], open_page: Make) -> None:
    page = open_page(ladder[1])
    assert len(page.source.encode()) < LARGEST
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert page.tags["link"] == 1  # the empty icon
    assert len(page.ids) == len(set(page.ids))
    order = ["answer", "architectures", "laws", "surfaces", "trust", "budgets"]
    order += ["trials", "provenance"]
    assert [i for i in page.ids if i in order] == order
    drawn = {i.removeprefix("figure-") for i in page.ids if i.startswith("figure-")}
    assert drawn >= {"learning-rate", "batch-tokens", "loss", "held-out", "prior", "budgets"}
    assert drawn >= {"noise", "load"}
    shown = page.json["figures"]
    assert drawn == {name for name in shown if not name.startswith("cell")}
    assert all(f["panels"] and all(p["series"] for p in f["panels"]) for f in shown.values())
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
    assert "workers 91" in page.text
    assert "raysweep report" in page.text
    for trace in ("None", "nan", "Estimate(", "np.float64"):
        assert trace not in page.text.split()


def test_no_sentence_is_said_twice(ladder: tuple[Fits, Path], open_page: Make) -> None:
    examples = Path(__file__).parents[2] / "reports" / "examples"
    for path in (ladder[1], *(examples / name / "index.html" for name in ("laptop", "imported"))):
        said = Counter(open_page(path).sentences)
        assert len(said) > 20
        assert [sentence for sentence, times in said.items() if times > 1] == []


def test_card_table_and_star_say_what_recommend_says(
    ladder: tuple[Fits, Path], open_page: Make
) -> None:
    fits, path = ladder
    page = open_page(path)
    text = page.text
    for name in ("dense", "moe"):
        told = fits.recommend(name, 1e9, 2e10)
        assert isinstance(told, Recommendation)
        assert written(told.learning_rate, "rate") in text
        assert written(told.batch_tokens, "batch") in text
        assert written(told.loss, "loss") in text
        for quantity, value in (
            ("learning-rate", told.learning_rate),
            ("batch-tokens", told.batch_tokens_exact),
            ("loss", told.loss),
        ):
            stars = [
                s["y"]
                for panel in page.json["figures"][quantity]["panels"]
                for s in panel["series"]
                if s["name"] == "asked" and s["names"] == [name]
            ]
            assert stars
            assert {y for ys in stars for y in ys} == {float(f"{value:.6g}")}
    first = fits.recommend("dense", 1e9, 2e10)
    assert isinstance(first, Recommendation)
    assert written(first.largest_batch, "batch") in text


def _beside(e: Estimate, style: str) -> str:
    return f"{written(e.value, style)} {between(e.low, e.high, style)}"


def test_tables_hold_the_fitted_numbers(ladder: tuple[Fits, Path], open_page: Make) -> None:
    fits, path = ladder
    text = open_page(path).text
    surface = next(iter(fits.evidence.values())).surface
    assert surface is not None
    for target in ("learning_rate", "batch_tokens"):
        for name in ("params", "tokens", "sparsity"):
            assert _beside(surface.laws.exponent(target, name), "exponent") in text
    for value in fits.loss_model("dense").coefficients.values():
        assert _beside(value, "coefficient") in text
    held = fits.held_out
    assert held is not None
    checks = dict(trust.checks(fits))
    by_architecture = [m.text.split(" of ") for m in checks["batch of held-out cells inside 95 %"]]
    inside, n = held.covered("batch_tokens")
    assert sum(int(m[0]) for m in by_architecture) == inside
    assert sum(int(m[1]) for m in by_architecture) == n
    for ratio in fits.comparison["moe"]:
        if ratio.ok and ratio.quantity != "loss":
            assert written(ratio.ratio.value, "ratio") in text
    rows = trust.prior_rows(fits)
    assert len(rows) == len(fits.prior_table) == 8
    assert all(row["value"] in text for row in rows)
    split = budgets.splits(fits)
    best = split.found["dense"][0]
    assert written(best.params, "params") in text


def test_the_law_is_drawn_through_the_star(ladder: tuple[Fits, Path]) -> None:
    fits = ladder[0]
    answers = ask(fits, [], [(1e9, 2e10)])
    figures = {f.name: f.to_pandas() for f in law_figures(fits, answers)}
    for name, value in (
        ("learning-rate", answers[0].run.learning_rate),
        ("loss", answers[0].run.loss),
    ):
        data = figures[name]
        ends = data[data["what"].str.startswith("dense, law") & (data["x_is"].str[0] == "C")]
        x, y = ends.sort_values("x")[["x", "y"]].to_numpy(float)[-1]
        assert x == pytest.approx(answers[0].run.run.compute, rel=0.02)
        assert y == pytest.approx(value, rel=0.01)


def test_every_law_is_named_once(ladder: tuple[Fits, Path]) -> None:
    rows = [(row.name, row.of) for row in law_rows(ladder[0])]
    assert len(rows) == len(set(rows))
    assert ("dense, moe", "loss") in rows


# ---------------------------------------------------------------------- states of a results folder

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "one cell": ({"architectures": ("dense",), "scales": 1}, "not determined"),
    "one trial": ({"architectures": ("moe",), "scales": 1, "trials": 1}, "too few"),
    "no finished trial": (
        {"status": "stopped", "loss": None, "reason": "stopped by hand"},
        "stopped by hand",
    ),
    "only failures": ({"status": "diverged", "loss": None, "reason": "not finite"}, "diverged"),
    "only crashes without a setting": (
        {"status": "crashed", "loss": None, "learning_rate": None, "batch_tokens": None},
        "no reason recorded",
    ),
    "no learning rates": (
        {"learning_rate": None, "batch_tokens": None, "batch_sequences": None},
        "learning rate and batch not determined",
    ),
    "one batch": (
        {"architectures": ("dense",), "scales": 3, "batch_tokens": 4096.0, "batch_sequences": 64},
        "at the batch that was run",
    ),
    "one learning rate": ({"architectures": ("dense",), "scales": 3, "learning_rate": 3e-3}, ""),
    "no optimum inside": ({"architectures": ("dense",), "scales": 2, "trials": 2}, "too few"),
    "twelve architectures": (
        {"architectures": tuple(f"moe{2 + k}" for k in range(12)), "scales": 1, "trials": 3},
        "moe13",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_page_for_every_state(
    case: str, make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    shape, expected = CASES[case]
    page = open_page(report(make_results(make_rows(**shape)), tmp_path / "out"))
    assert expected in page.text
    assert len(page.ids) == len(set(page.ids))
    assert not {"nan", "None", "inf"} & set(page.text.split())


def test_a_page_for_an_empty_folder(make_results: Make, open_page: Make, tmp_path: Path) -> None:
    page = open_page(report(make_results([]), tmp_path / "out"))
    assert "No results yet" in page.text
    assert "nothing to recommend yet" in page.text
    assert page.json["data-answers"] is None


@pytest.mark.slow
def test_several_data_sets_stand_apart(
    make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), scales=3)
    for row in make_rows(("dense",), scales=3):
        name = f"other-{row['cell']}"
        row |= {"study": "other", "data_hash": "0000", "cell": name}
        rows.append(row | {"trial_key": f"o{row['trial_key']}"[:20]})
    results = make_results(rows)
    fits = fit(results.to_pandas())
    assert len(fits.evidence) == 2
    page = open_page(report(results, tmp_path / "out", fits=fits))
    for name in fits.architectures:
        assert name in page.text
    entries = page.json["data-answers"]["entries"]
    assert [e["architecture"] for e in entries] == fits.architectures


@pytest.mark.slow
def test_a_hundred_cells_fit_in_a_page(
    make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 25, horizons=4, trials=4)
    page = open_page(report(make_results(rows), tmp_path / "out"))
    assert len(page.source.encode()) < LARGEST
    assert re.search(r"24 of \d+ cells are drawn", page.text)
    assert page.json["data-trials"]["shown"] == 400


@pytest.mark.slow
def test_budgets_that_were_held_have_parabolas(
    shared_data: Path, open_page: Make, tmp_path: Path
) -> None:
    results = Results.open(tmp_path / "results", create=True)
    results.write_many(published.read_isoflop(shared_data / "isoflop_llama3.csv"))
    page = open_page(report(results, tmp_path / "out"))
    panels = page.json["figures"]["budgets"]["panels"]
    read = [len(s["x"]) for p in panels for s in p["series"] if "parabolas" in s["name"]]
    assert sum(read) >= 8
    assert "surfaces" not in page.ids
    assert "outlier" in page.text


@pytest.mark.slow
def test_serving_is_that_of_the_fits(
    make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    """All six figures of Yun et al., and the table, as the study's section has it; and the noise
    scale along runs, as Wang et al.'s has it."""
    quarters = [{"loss": 6.0 - k, "grad_sq": 2.0, "trace": 8.0 + k} for k in range(4)]
    rows = make_rows(("dense", "moe4", "moe16"), 3, 2, trials=5, smallest=2e7,
                     noise_quarters=json.dumps(quarters))  # fmt: skip
    space = "study: s\nserving: {gpu: a100-40gb, dollars: 1.5, budgets: [1e21, 4e21, 1.6e22]}"
    results = make_results(rows, space=space)
    fits = fit(results.to_pandas())
    page = open_page(report(results, tmp_path / "out", fits=fits))
    told = fits.serve(4e21, Serving(find_gpu("a100-40gb"), 1.5))
    shown = [s for s in told if s.status == "found" and s.cost.status == "fits"]
    assert len(shown) > 3
    for solution in shown:
        assert written(solution.loss, "loss") in page.text
        assert dollars(solution.cost.dollars_per_million) in page.text
    assert "a100-40gb at $1.5 an hour" in page.text
    assert "Dense against MoE, as Wang et al. have it" in page.text
    for claim in fits.claims["moe16"]:
        assert claim.claim in page.text
    drawn = {name for name in page.json["figures"] if name.startswith("serving-")}
    kinds = ("loss", "cost", "optimal", "sizes", "equal", "bounded")
    assert drawn == {f"serving-{kind}" for kind in kinds}
    (panel,) = page.json["figures"]["noise-along"]["panels"]
    cells = [s for s in panel["series"] if s["name"] == "dense, cells"]
    assert len(cells) == 6
    for points in cells:
        assert points["x"] == [6.0, 5.0, 4.0, 3.0]
        assert points["y"] == [64 * (8 + k) / 2 for k in range(4)]


# ---------------------------------------------------------------------- what surrounds it


@pytest.mark.slow
def test_unreadable_search_space_does_not_stop_the_page(
    make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 1, trials=3)
    for i, space in enumerate(("targets: [{architecture: dense}", "- 1", "targets: {a: 1}")):
        results = make_results(rows, space=space)
        assert "What to run" in open_page(report(results, tmp_path / f"out{i}")).text


@pytest.mark.slow
def test_asked_runs_come_first_and_into_the_command(
    make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    results = make_results(make_rows(("dense",), 3))
    path = report(results, tmp_path / "out", asked=[("7B", "1.4T"), ("1B", "20B")])
    page = open_page(path)
    assert 'value="7B"' in page.source
    assert "--for 7B@1.4T --for 1B@20B" in page.text
    assert "1B on 20B" in page.text


@pytest.mark.slow
def test_a_page_of_another_study_is_not_overwritten(
    make_rows: Make, make_results: Make, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), 1, trials=3)
    folder = report(make_results(rows), tmp_path / "out").parent
    report(make_results(rows), folder)
    other = Results.open(tmp_path / "other", create=True)
    other.write_many(make_results(rows).to_pandas().assign(study="another"))
    with pytest.raises(UserError, match="holds the report of ladder: name another folder"):
        report(other, folder)


EVIL = "</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>${{7*7}}$\\frac{</style>"
COLUMNS = ("strategy", "reason", "device", "worker", "versions", "git_revision", "source")


@pytest.mark.slow
def test_strings_of_rows_stay_strings(
    make_rows: Make, make_results: Make, open_page: Make, tmp_path: Path
) -> None:
    rows = make_rows(("dense",), scales=2, trials=5)
    clean = open_page(report(make_results(rows), tmp_path / "clean"))
    for row in rows:
        row |= dict.fromkeys(COLUMNS, EVIL) | {"trial_key": f"evil-{row['trial_key']}"[:64]}
        for name in ("architecture", "scale", "cell", "study"):
            row[name] = f"{row[name]}{EVIL}/../../../x"
    space = f"study: ladder\ndescription: {json.dumps(EVIL)}\n"
    results = Results.open(tmp_path / "evil-results", create=True)
    results.write_many(make_results(rows).to_pandas().iloc[-len(rows) :])
    results.save_search_space("ladder", space)
    path = report(results, tmp_path / "evil", png=True)
    page = open_page(path)
    assert page.tags["script"] == clean.tags["script"]
    assert page.tags["img"] == 0
    assert page.tags["style"] == clean.tags["style"]
    assert not page.handlers
    assert not [v for v in page.links if v.strip().lower().startswith("javascript:")]
    assert "onerror=alert(1)>" not in page.source
    assert EVIL in "".join(page.words), "the rows are shown as text"
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures
    assert all(p.resolve().is_relative_to(tmp_path / "evil") for p in pictures)
