"""The page in headless Chromium: no error, no request; calculator, table, dark and print."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from raysweep.report import report
from raysweep.report.reading import answer_limits, extrapolation
from raysweep.results.store import Results
from raysweep.scaling import cautions
from raysweep.scaling.fits import Fits, fit

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

Drive = Callable[..., Any]

ASK = """
const form = document.getElementById("ask");
const set = (name, value) => {
  form.elements[name].value = value;
  form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
};
const data = JSON.parse(document.getElementById("data-calculator").textContent);
const answers = [];
for (const [architecture, params, tokens, experts, topK] of POINTS) {
  set("architecture", architecture);
  set("params", String(params));
  set("tokens", String(tokens));
  if (experts) { set("experts", String(experts)); set("top_k", String(topK)); }
  const shown = Object.fromEntries([...document.querySelectorAll("#ask-answer [data-out]")]
    .map((e) => [e.dataset.out, e.textContent]));
  const out = (name) => document.querySelector(`#ask-answer [data-out="${name}"]`);
  shown.limits = [...out("limits").children].map((e) => e.textContent);
  shown.far = out("reach").classList.contains("bad");
  answers.push({ shown, exact: recommend(data, architecture, params, tokens, experts, topK) });
}
return answers;
"""


def ask(drive: Drive, page: Path, points: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return drive(page, f"const POINTS = {json.dumps(points)};" + ASK)


def same(shown: float | None, expected: float) -> None:
    if math.isfinite(expected):
        assert shown == pytest.approx(expected, rel=5e-5)
    else:
        assert shown is None


def check(fits: Fits, point: tuple[Any, ...], answer: dict[str, Any]) -> None:
    """The calculator's numbers are those of `recommend`, to four digits and more; its warnings are
    the same, and what is shown of them is what a card would show."""
    name, params, tokens, experts, top_k = point
    expected = fits.recommend(name, params, tokens, experts=experts, top_k=top_k)
    exact = answer["exact"]
    same(exact["learning_rate"], expected.learning_rate)
    same(exact["batch_tokens"], expected.batch_tokens)
    same(exact["loss"]["value"], expected.loss)
    for side, interval in (
        ("rate", expected.learning_rate_interval),
        ("batch", expected.batch_tokens_interval),
        ("loss", expected.loss_interval),
    ):
        if exact[side] is not None:
            same(exact[side].get("low"), interval[0])
            same(exact[side].get("high"), interval[1])
    for quantity, factor in expected.extrapolation.items():
        same(exact["extrapolation"][quantity], factor)
    assert [p["source"] for p in exact["published"]] == [p["source"] for p in expected.published]
    for ours, theirs in zip(exact["published"], expected.published, strict=True):
        for quantity in ("learning_rate", "batch_tokens"):
            value = theirs[quantity]
            same(ours[quantity], value if isinstance(value, float) else math.nan)
    assert exact["warnings"] == list(expected.warnings), point
    assert answer["shown"]["limits"] == [Markup(w).unescape() for w in answer_limits(expected)]
    assert answer["shown"]["reach"] == extrapolation(expected) + "."
    assert answer["shown"]["far"] == bool(cautions.far(expected.extrapolation))
    if math.isfinite(expected.loss):
        assert float(answer["shown"]["loss"]) == pytest.approx(expected.loss, abs=5.1e-5)


def points_for(fits: Fits, count: int) -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(0)
    points = []
    for name in (n for n in fits.groups if n != "(all)"):
        routings = [(None, None)]
        if fits.groups[name].kind != "dense":
            routings += [(8, 2), (16, 2), (64, 1)]  # those searched, and others
        for i in range(count):
            params, tokens = 10 ** rng.uniform(3, 10.5), 10 ** rng.uniform(4, 13)
            points.append((name, params, tokens, *routings[i % len(routings)]))
    return points


def test_calculator_equals_recommend(ladder: tuple[Results, Path], drive: Drive) -> None:
    results, page = ladder
    fits = fit(results)
    points = points_for(fits, 12)
    assert len(points) >= 20
    for point, answer in zip(points, ask(drive, page, points), strict=True):
        check(fits, point, answer)


def floorless(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a loss whose floor would be below zero, so that a law's ends at its bound."""
    return row | {"loss": row["loss"] and row["loss"] - 1.7}


def countless(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a MoE that does not tell all its parameters, so that no share is known."""
    return row | {
        "params_total_non_embedding": row["params_active_non_embedding"],
        "params_total": row["params_active"],
    }


@pytest.mark.parametrize(
    ("shape", "change", "said"),
    [
        (
            {"scales": 3, "horizons": 2},
            dict,
            ["have no interior optimum", "the law of batch_tokens leaves out", "know compute only"],
        ),
        (
            {"architectures": ("dense",), "scales": 3},
            dict,
            ["no floor", "no law of batch_tokens can answer", "one in compute alone knows about"],
        ),
        ({"architectures": ("dense",)}, dict, ["leans on Step Law's", "know compute only"]),
        ({"architectures": ("moe",), "scales": 3}, dict, ["experts and top-"]),
        ({"architectures": ("moe",), "horizons": 2}, countless, ["2/3 is assumed"]),
        (
            {"architectures": ("dense",), "horizons": 2},
            floorless,
            ["the law of the loss is not certain"],
        ),
    ],
)
def test_calculator_equals_recommend_whatever_answers(
    shape: dict[str, Any],
    change: Callable[[dict[str, Any]], dict[str, Any]],
    said: list[str],
    make_rows: Callable,
    make_results: Callable,
    tmp_path: Path,
    drive: Drive,
) -> None:
    """Whichever laws answer, and whatever there is to be wary of: `said` must come up."""
    results = make_results([change(row) for row in make_rows(**shape)])
    fits = fit(results, n_boot=40)
    page = report(results, tmp_path / "out", fits=fits)
    points = points_for(fits, 12)
    answers = ask(drive, page, points)
    for point, answer in zip(points, answers, strict=True):
        check(fits, point, answer)
    warned = " ".join(w for a in answers for w in a["exact"]["warnings"])
    for words in (*said, "beyond the cells by", "below the cells by"):
        assert words in warned


def test_calculator_refuses_what_makes_no_sense(ladder: tuple[Results, Path], drive: Drive) -> None:
    said = drive(
        ladder[1],
        """
        const form = document.getElementById("ask"), said = [];
        for (const text of ["", "seven", "-1", "0", "1e999", "7 B", "7b"]) {
          form.elements.params.value = text;
          form.elements.params.dispatchEvent(new Event("input", { bubbles: true }));
          said.push(document.getElementById("ask-problem").hidden);
        }
        return said;
        """,
    )
    assert said == [False, False, False, False, False, True, True]


def test_table_sorts_filters_and_pages(ladder: tuple[Results, Path], drive: Drive) -> None:
    seen = drive(
        ladder[1],
        """
        const table = document.getElementById("trial-table");
        const form = document.getElementById("trial-filter");
        const column = (n) => [...table.tBodies[0].rows].map((r) => r.cells[n].textContent);
        const heads = [...table.tHead.rows[0].cells].map((c) => c.textContent);
        const loss = heads.indexOf("loss");
        const press = () => table.tHead.rows[0].cells[loss].firstChild.click();
        const all = document.getElementById("trial-count").textContent;
        press(); const up = column(loss);
        press(); const down = column(loss);
        const set = (name, value) => {
          form.elements[name].value = value;
          form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
        };
        set("status", "diverged");
        const count = () => document.getElementById("trial-count").textContent;
        const diverged = [column(heads.indexOf("status")), count()];
        set("status", ""); set("text", "moe-3");
        const found = column(heads.indexOf("cell"));
        set("text", "");
        const keys = () => column(heads.indexOf("trial"));
        const first = keys();
        document.getElementById("trial-on").click();
        const sort = table.tHead.rows[0].cells[loss].getAttribute("aria-sort");
        return { all, up, down, diverged, found, first, second: keys(), sort };
        """,
    )
    assert seen["all"] == "72 of 72 trials"
    rising = [float(v) for v in seen["up"] if v != "–"]
    falling = [float(v) for v in seen["down"] if v != "–"]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert seen["sort"] == "descending"
    assert set(seen["diverged"][0]) == {"diverged"}
    assert seen["diverged"][1] == "8 of 72 trials"
    assert set(seen["found"]) == {"moe-3-0"}
    assert len(seen["first"]) == 25
    assert not set(seen["first"]) & set(seen["second"])


def test_hover_values_and_csv(ladder: tuple[Results, Path], drive: Drive) -> None:
    seen = drive(
        ladder[1],
        """
        const saved = [];
        const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { saved.push(blob); return "#saved"; };
        for (const button of document.querySelectorAll("[data-csv]")) button.click();
        const texts = await Promise.all(saved.map((b) => b.text()));
        const titles = document.querySelectorAll(".cell svg title").length;
        const point = document.querySelector(".cell svg title").parentNode;
        point.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        const tip = document.getElementById("tip");
        return { texts, titles, tip: tip.hidden ? null : tip.textContent };
        """,
    )
    assert seen["titles"] == 72
    assert seen["tip"].startswith(("lr ", "diverged: lr "))
    names = [text.split("\n", 1)[0].split(",") for text in seen["texts"]]
    assert all(len(text.splitlines()) > 2 for text in seen["texts"])
    assert any("learning_rate" in n and "loss" in n for n in names)
    assert any("flops" in n for n in names)


def test_curves_open_and_close(ladder: tuple[Results, Path], drive: Drive) -> None:
    seen = drive(
        ladder[1],
        """
        const buttons = document.querySelectorAll("#trial-table tbody button");
        const lines = () => [...document.querySelectorAll("tr.curve polyline")]
          .map((l) => l.getAttribute("points").split(" ").length);
        buttons[1].click(); const open = lines();
        buttons[1].click(); const closed = lines();
        return { buttons: buttons.length, open, closed };
        """,
    )
    assert seen["buttons"] == 5
    assert len(seen["open"]) == 2  # its own, and the best of its cell
    assert min(seen["open"]) >= 6
    assert seen["closed"] == []


COLOURS = """
const style = getComputedStyle(document.body);
const ink = getComputedStyle(document.querySelector("#figure-optima svg text"));
return [style.backgroundColor, style.color, ink.fill];
"""


def test_dark_and_light(ladder: tuple[Results, Path], drive: Drive) -> None:
    light = drive(ladder[1], COLOURS, "--blink-settings=preferredColorScheme=1")
    dark = drive(ladder[1], COLOURS, "--blink-settings=preferredColorScheme=0")

    def brightness(colour: str) -> float:
        return sum(float(v) for v in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])

    assert brightness(light[0]) > 700
    assert brightness(dark[0]) < 100
    for shade, text in ((light, "dark"), (dark, "light")):
        for colour in shade[1:]:
            assert (brightness(colour) < 380) == (text == "dark"), (text, colour)


def test_prints(ladder: tuple[Results, Path], browser: str, tmp_path: Path) -> None:
    import subprocess

    out = tmp_path / "page.pdf"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={out}"]
    subprocess.run([*command, ladder[1].as_uri()], check=True, capture_output=True, timeout=180)
    pages = out.read_bytes().count(b"/Type /Page\n") or out.read_bytes().count(b"/Type /Page")
    assert 3 <= pages <= 20


@pytest.mark.parametrize("scheme", [0, 1])
def test_accessible(ladder: tuple[Results, Path], drive: Drive, scheme: int) -> None:
    spec = find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe is not installed: pip install axe-core-python")
    axe = (Path(spec.origin).parent / "axe.min.js").read_text().replace("</script", "<\\/script")
    found = drive(
        ladder[1],
        """
        const result = await axe.run(document, { resultTypes: ["violations"] });
        return result.violations.map((v) => [v.impact, v.id, v.help,
                                             v.nodes.slice(0, 4).map((n) => n.html.slice(0, 160))]);
        """,
        f"--blink-settings=preferredColorScheme={scheme}",
        before=f"<script>{axe}</script>",
    )
    assert [v for v in found if v[0] in ("serious", "critical")] == []


def test_forty_cells_and_two_thousand_trials(
    make_rows: Callable, make_results: Callable, tmp_path: Path, drive: Drive
) -> None:
    results = make_results(make_rows(("dense", "moe"), 5, horizons=4, trials=50))
    start = time.process_time()
    page = report(results, tmp_path / "out")
    assert time.process_time() - start < 20  # of this process alone, whatever else runs here
    assert page.stat().st_size < 3_000_000
    assert drive(page, "return document.querySelectorAll('.cell').length") == 36
