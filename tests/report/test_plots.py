"""Figures that can be explored: what Plotly is given, and what a reader does with it."""

# ruff: noqa: E501 (scripts have lines of their own)

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysweep.report.compare import write_comparison
from raysweep.report.figure import Axis, Contours, Line, Panel, PlotFigure, Points
from raysweep.report.interactive import described, library
from raysweep.scaling.compare import compare_arms
from raysweep.scaling.fits import Fits

Drive = Callable[..., Any]
Ladder = tuple[Fits, Path]

DO = """
const until = async (found) => {
  for (let i = 0; i < 15000; i++) { // of virtual time: unpacking takes real time

    const value = found();
    if (value) return value;
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error(`not in time: ${found}`);
};
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const drawn = async (selector) => {
  const figure = document.querySelector(selector);
  figure.scrollIntoView({ behavior: "instant", block: "center" });
  await until(() => figure.classList.contains("drawn"));
  return figure;
};
const seen = (e) => e.getClientRects().length > 0;
const place = (plot, x, y, k = "") => {
  const [across, up] = [plot._fullLayout[`xaxis${k}`], plot._fullLayout[`yaxis${k}`]];
  const box = plot.getBoundingClientRect();
  return { clientX: box.left + across._offset + across.d2p(x), clientY: box.top + up._offset + up.d2p(y) };
};
const mouse = (target, kind, where) =>
  target.dispatchEvent(new MouseEvent(kind, { bubbles: true, cancelable: true, view: window, ...where }));
const layer = (plot, k = 0) => plot.querySelectorAll(".nsewdrag")[k];
const click = async (plot, where, k = 0) => {
  mouse(layer(plot, k), "mousemove", where);
  await pause(100);
  mouse(layer(plot, k), "mousedown", where);
  mouse(document.querySelector(".dragcover") ?? layer(plot, k), "mouseup", where);
  await pause(400);
};
const hover = (plot) => plot.querySelector(".hoverlayer .hovertext")?.textContent ?? "";
"""


def test_a_figure_is_described_by_plain_values() -> None:
    x = np.array([1e3, 1e5])
    dots = Points("dense, cells", x, 1 / x, "c1", low=0.5 / x, high=np.array([np.nan, 1.0]), keys=["a", "b"],
                  full=np.array([True, False]), shades={"N": x})  # fmt: skip
    line = Line("law of others", x, 2 / x, legend="published laws", end="others")
    grid = Contours("surface", x, x, np.array([[0.0, 0.1234567], [1e9, 1]]), (0.01, 0.1))
    panel = Panel(Axis("N", "params"), Axis("rate", "rate"), (grid, line, dots), neutral=1.0)
    told = described(PlotFigure("one", "what it shows", (panel,), choose=("N",)), {"b": 7})
    assert json.loads(json.dumps(told, allow_nan=False)) == json.loads(json.dumps(told))
    surface, law, cells = told["panels"][0]["series"]
    assert surface["values"] == [[0.0, 0.123], [1000.0, 1.0]]
    assert (law["legend"], cells["legend"]) == ("published laws", "dense")
    assert (cells["high"], cells["full"], cells["rows"]) == ([None, 1.0], [1, 0], [-1, 7])
    low, high = told["panels"][0]["x"]["limits"]
    assert low < 1e3 < 1e5 < high


def test_the_library_is_that_of_the_wheel() -> None:
    script = gzip.decompress(base64.b64decode(library())).decode()
    assert "plotly.js" in script[:200]
    assert "MIT" in script[:400]
    assert len(library()) < 2_100_000


@pytest.mark.browser
def test_plotly_loads_when_a_figure_is_seen_and_stands_in_the_pictures_place(
    ladder: Ladder, drive: Drive
) -> None:
    seen = drive(
        ladder[1],
        DO
        + """
        const before = [typeof window.Plotly, document.querySelectorAll(".drawn").length];
        const figure = await drawn("#figure-learning-rate");
        const [picture, plot] = [figure.querySelector(".static"), figure.querySelector(".plot")];
        const others = document.querySelectorAll(".tab .drawn").length;
        return { before, after: typeof window.Plotly, one: [seen(picture), seen(plot)], others };
        """,
        "--window-size=1200,500",
    )
    assert seen == {
        "before": ["undefined", 0],
        "after": "object",
        "one": [False, True],
        "others": 1,  # those of the other tabs wait
    }


@pytest.mark.browser
def test_hover_and_touch_tell_the_nearest_point(ladder: Ladder, drive: Drive) -> None:
    cells = ladder[0].cells
    shown = drive(
        ladder[1],
        DO
        + f"const cells = {json.dumps(cells[['params_active_non_embedding', 'learning_rate']].values.tolist())};"
        + """
        const plot = (await drawn("#figure-learning-rate")).querySelector(".plot");
        const found = [];
        for (const [x, y] of cells) {
          const where = place(plot, x, y);
          mouse(layer(plot), "mousemove", { clientX: where.clientX + 3, clientY: where.clientY - 3 });
          await pause(150);
          found.push(hover(plot));
        }
        mouse(layer(plot), "mouseout", place(plot, ...cells[0]));
        await pause(200);
        const gone = hover(plot);
        const touch = new Touch({ identifier: 1, target: layer(plot), ...place(plot, ...cells[0]) });
        const finger = (kind, touches) => layer(plot).dispatchEvent(new TouchEvent(kind, {
          bubbles: true, cancelable: true, touches, changedTouches: [touch] }));
        finger("touchstart", [touch]);
        finger("touchend", []);
        await pause(300);
        return { found, gone, touched: hover(plot) };
        """,
    )
    assert shown["found"] == [f"{name}: {row}" for name, row in zip(
        cells.index, [text.split(": ")[1] for text in shown["found"]], strict=True)]  # fmt: skip
    assert shown["gone"] == ""
    assert shown["touched"].startswith(f"{cells.index[0]}: ")


@pytest.mark.browser
def test_zoom_reset_and_legend(ladder: Ladder, drive: Drive) -> None:
    shown = drive(
        ladder[1],
        DO
        + """
        const plot = (await drawn("#figure-learning-rate")).querySelector(".plot");
        const range = () => [...plot.layout.xaxis.range];
        const ticks = () => [...plot.querySelectorAll(".xtick text")].map((t) => t.textContent);
        const whole = [range(), ticks()];
        const box = layer(plot).getBoundingClientRect();
        const at = (share) => ({ buttons: 1, clientX: box.left + share * box.width, clientY: box.top + share * box.height });
        mouse(layer(plot), "mousedown", at(0.4));
        const cover = () => document.querySelector(".dragcover") ?? document;
        for (const share of [0.45, 0.5, 0.6]) mouse(cover(), "mousemove", at(share));
        await pause(100);
        mouse(cover(), "mouseup", at(0.6));
        await pause(800);
        const near = [range(), ticks()];
        plot.querySelector('.modebar-btn[data-attr="zoom"][data-val="reset"]').dispatchEvent(new MouseEvent("click", { bubbles: true }));
        await pause(600);
        const again = range();
        const legend = [...plot.querySelectorAll(".legend .traces")].map((g) => g.textContent);
        const lines = () => plot.querySelectorAll("path.js-line").length;
        const all = lines();
        const toggle = plot.querySelectorAll(".legendtoggle")[legend.indexOf("published laws")];
        for (const kind of ["mousedown", "mouseup"]) mouse(toggle, kind, {});
        await pause(800);
        return { whole, near, again, legend, all, fewer: lines() };
        """,
    )
    (low, high), _ = shown["whole"]
    (near_low, near_high), ticks = shown["near"]
    assert low < near_low < near_high < high, (shown["whole"], shown["near"])
    assert near_high - near_low == pytest.approx(0.2 * (high - low), rel=0.1)
    assert len(ticks) >= 2
    assert shown["again"] == pytest.approx([low, high])
    assert shown["legend"] == ["dense", "moe", "run asked about", "published laws"]
    assert shown["fewer"] < shown["all"]


@pytest.mark.browser
def test_figures_of_a_comparison_tell_its_ratios_and_cells(
    ladder: Ladder, drive: Drive, tmp_path: Path
) -> None:
    arms = [ladder[0].arm("dense"), ladder[0].arm("moe")]
    ratios = [r for r in compare_arms(arms[0], arms[1]) if r.ok]
    cells = ladder[0].cells_of("moe")
    page = write_comparison(arms, tmp_path / "out")
    shown = drive(
        page,
        DO
        + f"const cells = {json.dumps(cells[['flops', 'learning_rate']].values.tolist())};"
        + """
        const panel = (await kit.figure("ratios")).panels[0];
        const ratios = (await drawn("#figure-ratios")).querySelector(".plot");
        const at = async (plot, x, y) => {
          mouse(layer(plot), "mousemove", place(plot, x, y));
          await pause(150);
          return hover(plot);
        };
        const [dots] = panel.series, told = {};
        for (const [i, x] of dots.x.entries()) told[panel.y.names[Math.round(dots.y[i])]] = await at(ratios, x, dots.y[i]);
        const sides = (await drawn("#figure-sides")).querySelector(".plot");
        const found = [];
        for (const [x, y] of cells) found.push(await at(sides, x, y));
        const marks = () => sides.querySelectorAll("path.js-line").length;
        const all = marks();
        const legend = [...sides.querySelectorAll(".legend .traces")].map((g) => g.textContent);
        const toggle = sides.querySelectorAll(".legendtoggle")[legend.indexOf("moe")];
        for (const kind of ["mousedown", "mouseup"]) mouse(toggle, kind, {});
        await pause(800);
        return { told, found, legend, all, fewer: marks() };
        """,
    )
    for r in ratios:
        assert r.said in shown["told"][r.name]
    assert [text.split(":")[0] for text in shown["found"]] == list(cells.index)
    assert shown["legend"] == ["dense", "moe"]
    assert 0 < shown["fewer"] < shown["all"], shown


@pytest.mark.browser
def test_axis_and_colour_can_be_chosen(ladder: Ladder, drive: Drive) -> None:
    shown = drive(
        ladder[1],
        DO
        + """
        const figure = await drawn("#figure-learning-rate");
        const plot = figure.querySelector(".plot");
        const label = () => plot.querySelector(".xtitle").textContent;
        const press = async (name, k) => {
          const group = figure.querySelectorAll(".tools [role=group]")[k];
          [...group.children].find((b) => b.textContent === name).click();
          await pause(500);
        };
        const labels = [];
        for (const button of [...figure.querySelectorAll(".tools [role=group]")[0].children]) {
          await press(button.textContent, 0);
          labels.push([button.textContent, label()]);
        }
        const fills = () => new Set([...plot.querySelectorAll(".points path")].map((p) => p.style.fill)).size;
        await press("C", 0);
        const before = fills();
        await press("N", 1);
        return { labels, before, after: fills(), bar: plot.querySelectorAll(".cbaxis text").length };
        """,
    )
    assert shown["labels"] == [
        ["N", "N, active parameters"],
        ["D", "D, tokens"],
        ["C", "C, training FLOPs"],
        ["loss", "loss, nats a token"],
    ]
    assert shown["after"] > shown["before"]
    assert shown["bar"] >= 2


@pytest.mark.browser
def test_a_dot_opens_its_row_and_a_cell_its_surface(ladder: Ladder, drive: Drive) -> None:
    row = ladder[0].cells.loc["dense-0-0"]
    key = hashlib.sha256(b"dense-0-0-1").hexdigest()[:20]  # one with a curve
    shown = drive(
        ladder[1],
        DO
        + f"const [n, rate] = {json.dumps([row['params_active_non_embedding'], row['learning_rate']])}, key = '{key}';"
        + """
        const laws = (await drawn("#figure-learning-rate")).querySelector(".plot");
        await click(laws, place(laws, n, rate));
        const chosen = document.querySelector(".cell.on");
        await until(() => chosen.classList.contains("drawn"));
        chosen.scrollIntoView({ behavior: "instant", block: "center" });
        const plot = chosen.querySelector(".plot");
        const row = kit.read("data-trials").columns[0].values.indexOf(key);
        const { series } = plots.drawn.get(chosen).made;
        const dots = series.findIndex((s) => s.rows?.includes(row));
        const i = series[dots].rows.indexOf(row);
        await click(plot, place(plot, series[dots].x[i], series[dots].y[i]));
        const opened = await until(() => chosen.querySelector(".opened"));
        return { cell: chosen.dataset.cell, rows: opened.querySelectorAll("tbody > tr").length,
          text: opened.querySelector("tbody tr").textContent, curve: opened.querySelectorAll("polyline").length,
          hidden: seen(chosen.querySelector(".static")) };
        """,
    )
    assert shown["cell"] == "dense-0-0"
    assert "dense-0-0" in shown["text"]
    assert shown["rows"] == 2
    assert shown["curve"] == 2
    assert shown["hidden"] is False


@pytest.mark.browser
def test_what_is_kept_in_the_table_stands_out_everywhere(ladder: Ladder, drive: Drive) -> None:
    shown = drive(
        ladder[1],
        DO
        + """
        const laws = (await drawn("#figure-learning-rate")).querySelector(".plot");
        const surface = (await drawn(".cell.on")).querySelector(".plot");
        const form = document.getElementById("trial-filter");
        const count = () => document.getElementById("trial-count").textContent;
        const kept = (plot) => plot.data.filter((t) => t.selectedpoints).map((t) => t.selectedpoints.length);
        const lines = (role) => (document.querySelector(`#parallel path[stroke="var(--${role})"]:not([opacity="0.25"])`).getAttribute("d").match(/M/g) ?? []).length;
        const whole = [count(), kept(laws), kept(surface), lines("c0"), lines("c1")];
        form.elements.to_params_active_non_embedding.value = "250k";
        form.dispatchEvent(new Event("input", { bubbles: true }));
        await pause(900);
        const small = [count(), kept(laws), kept(surface), lines("c0"), lines("c1")];
        document.getElementById("trial-clear").click();
        await pause(900);
        const cleared = [count(), kept(laws).length, form.elements.to_params_active_non_embedding.value];
        const grip = document.querySelector('#parallel .grip[data-axis="4"]'), box = grip.getBoundingClientRect();
        grip.setPointerCapture = () => {};
        const move = (kind, share) => grip.dispatchEvent(new PointerEvent(kind, { bubbles: true, pointerId: 1, clientX: box.left + 5, clientY: box.top + share * box.height }));
        move("pointerdown", 0.7); move("pointermove", 0.9); move("pointerup", 1);
        await pause(900);
        const dragged = [count(), form.elements.from_loss.value, form.elements.to_loss.value];
        document.getElementById("trial-clear").click();
        await pause(300);
        surface.emit("plotly_selected", { points: [{ curveNumber: surface.data.findIndex((t) => t.name === "trials"), pointNumber: 0 }] });
        await pause(300);
        return { whole, small, cleared, dragged, picked: count() };
        """,
    )
    assert shown["whole"][0] == "72 of 72 trials"
    assert shown["whole"][1:3] == [[], []]
    assert shown["small"][0] == "18 of 72 trials"
    assert shown["small"][1] == [1, 1]  # of each architecture the smallest cell
    assert set(shown["small"][2]) == {0}  # the largest cell has none of them
    assert shown["whole"][3:] == [32, 32]
    assert shown["small"][3:] == [8, 8]
    assert shown["cleared"] == ["72 of 72 trials", 0, ""]
    n = int(shown["dragged"][0].split()[0])
    losses = ladder[0].table.trials["loss"]
    low, high = (float(v) for v in shown["dragged"][1:])
    assert n == int(((losses >= low) & (losses <= high)).sum())
    assert 0 < n < 72
    assert shown["picked"] == "1 of 72 trials"


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", [0, 1])
def test_all_figures_fit_the_page_in_light_and_dark(
    ladder: Ladder, drive: Drive, width: int, scheme: int
) -> None:
    shown = drive(
        ladder[1],
        DO
        + """
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        const figures = [...document.querySelectorAll("[data-plot]")].filter((f) => seen(f) && (!f.classList.contains("cell") || f.classList.contains("on")));
        for (const figure of figures) plots.show(figure);
        await until(() => figures.every((f) => f.classList.contains("drawn")));
        await pause(300);
        const cut = figures.flatMap((figure) => {
          const own = figure.querySelector(".plot").getBoundingClientRect();
          return [...figure.querySelectorAll(".plot text")].filter((t) => {
            const box = t.getBoundingClientRect();
            return box.width && !t.closest(".hoverlayer") && (box.left < own.left - 1 || box.right > own.right + 1 || box.top < own.top - 1 || box.bottom > own.bottom + 1);
          }).map((t) => `${figure.dataset.plot}: ${t.textContent}`);
        });
        const tick = getComputedStyle(figures[0].querySelector(".xtick text")).fill;
        return { n: figures.length, cut, wide: document.scrollingElement.scrollWidth - innerWidth, tick };
        """,
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    assert shown["n"] >= 7
    assert shown["cut"] == []
    assert shown["wide"] <= 0
    brightness = sum(float(v) for v in shown["tick"].removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness > 380) == (scheme == 0)


@pytest.mark.browser
def test_without_scripts_the_pictures_stand(ladder: Ladder, browser: str, tmp_path: Path) -> None:
    from matplotlib.image import imread

    out = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1200,6000", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=1"]
    page = tmp_path / "page.html"
    html = ladder[1].read_text()
    assert "script-src 'unsafe-inline'" in html
    page.write_text(html.replace("script-src 'unsafe-inline'", "script-src 'none'", 1))
    done = subprocess.run(
        [*command, f"--screenshot={out}", page.as_uri()],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert out.exists(), done.stderr[-2000:]
    shown = (np.asarray(imread(out))[:, :, :3] * 255).round().astype(int)
    # The colours of contours and of the published laws are drawn by the pictures alone.
    for colour in ("#98a2ab", "#0072b2", "#d55e00"):
        value = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(shown - value).max(axis=2) <= 2).sum() > 100, colour
