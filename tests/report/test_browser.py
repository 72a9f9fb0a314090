"""The page in headless Chromium: form, links, tabs, surfaces, table, dark, print, accessibility."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raysweep.report import report
from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import Recommendation
from raysweep.text import STYLES

pytestmark = pytest.mark.browser

Drive = Callable[..., Any]
Ladder = tuple[Fits, Path]


def test_numbers_are_written_as_text_py_writes_them(ladder: Ladder, drive: Drive) -> None:
    rng = np.random.default_rng(0)
    values = [float(f"{10 ** rng.uniform(-5, 14):.6g}") for _ in range(60)]
    values += [999999.0, 0.01, 1e3, 1.0, 0.0999]
    shown = drive(
        ladder[1],
        f"const values = {json.dumps(values)};"
        "return ['rate', 'batch', 'tokens', 'params', 'flops', 'loss']"
        ".map((s) => [s, values.map((v) => kit.styles[s](v))]);",
    )
    for style, texts in shown:
        told = [STYLES[style](v) for v in values]
        large = style in ("batch", "tokens", "params")
        assert [t for t, v in zip(texts, values, strict=True) if v > 1e-3 or not large] == [
            t for t, v in zip(told, values, strict=True) if v > 1e-3 or not large
        ], style


def test_form_and_table_of_architectures_agree(ladder: Ladder, drive: Drive) -> None:
    fits, page = ladder
    shown = drive(
        page,
        """
        const beside = (name, key) =>
          document.querySelector(`[data-side="${name}"] [data-side-out="${key}"]`).textContent;
        set("params", "300M"); set("tokens", "9B"); set("architecture", "moe");
        const within = form.elements.within;
        const most = [...within.options].map((o) => {
          set("within", o.value);
          return out("most");
        });
        return { rate: out("learning_rate"), batch: out("batch_tokens"), loss: out("loss"), most,
          beside: ["learning_rate", "batch_tokens", "loss"].map((k) => beside("moe", k)),
          dense: beside("dense", "learning_rate"), size: [out("side_params"), out("side_tokens")],
          charts: document.querySelectorAll("#ask-charts svg").length,
          stars: document.querySelectorAll("#ask-charts polygon title").length,
          dots: document.querySelectorAll("#ask-charts circle").length };
        """,
    )
    told = fits.recommend("moe", 3e8, 9e9)
    dense = fits.recommend("dense", 3e8, 9e9)
    assert isinstance(told, Recommendation)
    assert isinstance(dense, Recommendation)
    assert shown["beside"] == [shown["rate"], shown["batch"], shown["loss"]]
    assert float(shown["rate"]) == pytest.approx(told.learning_rate, rel=0.02)
    assert float(shown["dense"]) == pytest.approx(dense.learning_rate, rel=0.02)
    assert float(shown["loss"]) == pytest.approx(told.loss, rel=2e-3)
    assert shown["size"] == ["300M", "9B"]
    assert len(set(shown["most"])) == len(shown["most"]) == 5
    assert (shown["charts"], shown["stars"], shown["dots"]) == (3, 3, 12)


def test_copies_are_what_is_shown(ladder: Ladder, drive: Drive) -> None:
    fits, page = ladder
    texts = drive(
        page,
        """
        const copied = [];
        Object.defineProperty(navigator, "clipboard",
          { value: { writeText: async (text) => { copied.push(text); } } });
        set("architecture", "moe");
        for (const button of document.querySelectorAll("[data-copy]")) button.click();
        await new Promise((done) => setTimeout(done, 50));
        return copied;
        """,
    )
    command, yaml_text, json_text, link = texts
    told = fits.recommend("moe", 1e9, 2e10)
    assert isinstance(told, Recommendation)
    assert "#N=1B&D=20B&a=moe&e=8%2F2" in link
    assert command.startswith("raysweep recommend ")
    assert "--params 1000000000 --tokens 20000000000 --architecture moe --experts 8" in command
    found = json.loads(json_text)
    assert found["learning_rate"] == told.learning_rate
    assert found["batch_sequences"] == told.batch_sequences
    assert found["loss"] == pytest.approx(told.loss, rel=1e-4)
    assert f"learning_rate: {found['learning_rate']}" in yaml_text


def test_form_refuses_what_makes_no_sense(ladder: Ladder, drive: Drive) -> None:
    said = drive(
        ladder[1],
        """
        const given = ["", "seven", "-1", "0", "1e999", "7", "1,4T", "7 B", "7b", "1,400,000"];
        return given.map((text) => {
          set("params", text);
          const notice = document.getElementById("ask-problem");
          return notice.hidden ? "" : notice.textContent;
        });
        """,
    )
    assert all(
        text.startswith("Active parameters must be a number above zero") for text in said[:5]
    )
    assert said[5] == "Active parameters 7: did you mean 7B?"
    assert said[6] == "Active parameters: write 1.4T."
    assert said[7:] == ["", "", ""]


def test_tabs_and_surfaces_show_one_at_a_time(ladder: Ladder, drive: Drive) -> None:
    seen = drive(
        ladder[1],
        """
        const seen = (e) => e.getClientRects().length > 0;
        const tabs = [...document.querySelectorAll(".tabs > input")];
        const shown = tabs.map((tab) => {
          tab.click();
          return [...document.querySelectorAll(".tab")].map(seen);
        });
        const cells = [...document.querySelectorAll("#cells .cell")];
        const large = () => cells.map((c) => c.getBoundingClientRect().width > 400);
        const first = large();
        cells[0].querySelector(".pick").click();
        return { shown, first, second: large() };
        """,
    )
    assert seen["shown"] == [[k == i for k in range(3)] for i in range(3)]
    assert seen["first"] == [False] * 7 + [True]
    assert seen["second"] == [True] + [False] * 7


def test_table_sorts_filters_and_pages(ladder: Ladder, drive: Drive) -> None:
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
    assert len(seen["first"]) == 8
    assert not set(seen["first"]) & set(seen["second"])


def test_data_can_be_downloaded(ladder: Ladder, drive: Drive) -> None:
    texts = drive(
        ladder[1],
        """
        const saved = [];
        URL.createObjectURL = (blob) => { saved.push(blob); return "#saved"; };
        const buttons = document.querySelectorAll("[data-csv]");
        for (const button of buttons) button.click();
        for (let i = 0; i < 15000 && saved.length < buttons.length; i++)
          await new Promise((done) => setTimeout(done, 50));
        const evil = kit.csv.text([["=1+1", "@x", "-x", 'a "b", c', -1, null]]);
        return [...await Promise.all(saved.map((b) => b.text())), evil];
        """,
    )
    *texts, evil = (pd.read_csv(io.StringIO(text)) for text in texts)
    assert list(evil.columns[:5]) == ["'=1+1", "'@x", "'-x", 'a "b", c', "-1"]
    assert all(len(data) > 2 for data in texts)
    assert any({"learning_rate", "loss"} <= set(data.columns) for data in texts)
    laws = next(d for d in texts if "y_is" in d and "optimal learning rate" in set(d["y_is"]))
    cells = ladder[0].cells
    own = laws[laws["name"].isin(cells.index)].drop_duplicates("name").set_index("name")
    assert own.loc[cells.index, "y"].to_numpy() == pytest.approx(cells["learning_rate"], rel=1e-5)


def test_curves_open_and_close(ladder: Ladder, drive: Drive) -> None:
    seen = drive(
        ladder[1],
        """
        const search = document.getElementById("trial-filter").elements.text;
        search.value = "dense-0-0";
        search.dispatchEvent(new Event("input", { bubbles: true }));
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
const ink = getComputedStyle(document.querySelector("#figure-learning-rate svg text"));
return [style.backgroundColor, style.color, ink.fill];
"""


def test_dark_and_light(ladder: Ladder, drive: Drive) -> None:
    light = drive(ladder[1], COLOURS, "--blink-settings=preferredColorScheme=1")
    dark = drive(ladder[1], COLOURS, "--blink-settings=preferredColorScheme=0")

    def brightness(colour: str) -> float:
        return sum(float(v) for v in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])

    assert brightness(light[0]) > 700
    assert brightness(dark[0]) < 100
    for shade, text in ((light, "dark"), (dark, "light")):
        for colour in shade[1:]:
            assert (brightness(colour) < 380) == (text == "dark"), (text, colour)


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_cut_and_the_page_is_short(ladder: Ladder, drive: Drive, width: int) -> None:
    seen = drive(
        ladder[1],
        """
        const figures = [...document.querySelectorAll("[data-plot]")].filter((f) =>
          f.checkVisibility({ contentVisibilityAuto: true }) && !f.matches(".cell:not(.on)"));
        for (const figure of figures) plots.show(figure);
        for (let i = 0; i < 15000 && !figures.every((f) => f.matches(".drawn")); i++)
          await new Promise((done) => setTimeout(done, 50));
        const root = document.scrollingElement;
        const prose = [...document.querySelectorAll("main p:not(.key), main li, main figcaption")]
          .filter((e) => !e.closest("table, details, .cell, nav") && e.getClientRects().length);
        const words = prose.map((e) => e.textContent).join(" ").split(/\\s+/).length;
        // A study of models too small to be served, as the demo's, has no such section.
        const served = document.getElementById("serving")?.offsetHeight ?? 0;
        return { wide: root.scrollWidth - innerWidth, tall: root.scrollHeight - served, words,
          drawn: figures.filter((f) => f.matches(".drawn")).length };
        """,
        f"--window-size={width},900",
    )
    assert seen["wide"] <= 0
    assert seen["drawn"] >= 5
    if width == 1400:
        assert seen["tall"] <= 6000
        assert 50 < seen["words"] <= 350


def test_prints(ladder: Ladder, browser: str, tmp_path: Path) -> None:
    out = tmp_path / "page.pdf"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={out}"]
    subprocess.run([*command, ladder[1].as_uri()], check=True, capture_output=True, timeout=180)
    pages = out.read_bytes().count(b"/Type /Page\n") or out.read_bytes().count(b"/Type /Page")
    assert 3 <= pages <= 20


@pytest.mark.parametrize("scheme", [0, 1])
def test_accessible(ladder: Ladder, drive: Drive, scheme: int) -> None:
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
    assert time.process_time() - start < 40  # of this process alone, whatever else runs here
    assert page.stat().st_size < 4_000_000
    seen = drive(
        page,
        "return [document.querySelectorAll('.cell').length, kit.read('data-trials').shown,"
        " document.querySelectorAll('#parallel path').length];",
    )
    assert seen[:2] == [24, 2000]
    assert seen[2] == 4
