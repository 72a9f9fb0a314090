"""The page's address: what the reader sets stands in it, and comes again by it."""

# ruff: noqa: E501 (scripts have lines of their own)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import Recommendation

pytestmark = pytest.mark.browser

Drive = Callable[..., Any]
Ladder = tuple[Fits, Path]

SETTINGS = """
const filter = document.getElementById("trial-filter");
const shown = () => ({
  asked: ["params", "tokens", "architecture", "routing", "within"]
    .map((n) => form.elements[n].value).join(" "),
  rate: out("learning_rate"),
  tab: document.querySelector(".tabs > input:checked").id,
  pressed: [...document.querySelectorAll("#figure-loss .tools button[aria-pressed=true]")]
    .map((b) => b.textContent).join(" "),
  kept: document.getElementById("trial-count").textContent,
  filled: [...filter.elements].filter((e) => e.name && e.value)
    .map((e) => `${e.name}=${e.value}`).join(" "),
  sorted: document.querySelector("#trial-table th[aria-sort]")?.textContent ?? "",
});
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const ready = async () => {
  const figure = document.getElementById("figure-loss");
  document.getElementById("laws").scrollIntoView({ behavior: "instant" });
  if (figure.checkVisibility()) plots.show(figure);
  for (let i = 0; i < 15000 && !figure.querySelector(".tools"); i++) await pause(50);
};
"""


def test_url_holds_what_is_asked(ladder: Ladder, drive: Drive) -> None:
    asked = drive(
        ladder[1],
        'set("architecture", "moe"); set("params", "2B"); return location.hash;',
    )
    assert asked.startswith("#N=2B&D=20B&a=moe&e=8%2F2")
    shown = drive(
        ladder[1],
        """
        return ["params", "tokens", "architecture", "routing"].map((n) => form.elements[n].value)
          .concat(out("learning_rate"));
        """,
        fragment=asked,
    )
    told = ladder[0].recommend("moe", 2e9, 2e10)
    assert isinstance(told, Recommendation)
    assert shown[:4] == ["2B", "20B", "moe", "8/2"]
    assert float(shown[4]) == pytest.approx(told.learning_rate, rel=0.02)


def test_back_and_forward_and_a_copied_link_bring_the_settings_again(
    ladder: Ladder, drive: Drive
) -> None:
    seen = drive(
        ladder[1],
        SETTINGS
        + """
        const press = (text) => [...document.querySelectorAll("#figure-loss .tools button")]
          .find((b) => b.textContent === text).click();
        const fill = (name, value) => {
          filter.elements[name].value = value;
          filter.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
        };
        const before = history.length;
        document.getElementById("tab-loss").click();
        await ready();
        const steps = [
          () => {}, // the tab
          () => { for (const n of ["7", "70", "70M"]) set("params", n); }, // typed: one step
          () => set("within", "3"),
          () => set("architecture", "moe"),
          () => press("D"), // the x-axis, first of two such buttons
          () => [...document.querySelectorAll("#figure-loss [aria-label=colour] button")][1].click(),
          () => fill("from_loss", "2.5"),
          () => document.querySelector("#trial-table thead button").click(),
          () => { location.hash = "#laws"; }, // a link within the page
        ];
        const told = [];
        for (const step of steps) {
          step();
          await pause(1600);
          told.push(shown());
        }
        const entries = history.length - before;
        const back = [];
        for (let i = 0; i < steps.length; i++) { back.push(shown()); history.back(); await pause(300); }
        const first = shown();
        const forth = [];
        for (let i = 0; i < steps.length; i++) { history.forward(); await pause(300); forth.push(shown()); }
        let copied = "";
        Object.defineProperty(navigator, "clipboard",
          { value: { writeText: async (text) => { copied = text; } } });
        document.querySelector('[data-copy="link"]').click();
        return { told, entries, back: back.reverse(), first, forth, copied };
        """,
    )
    told = seen["told"]
    assert seen["entries"] == len(told)
    assert seen["back"] == seen["forth"] == told
    texts = [json.dumps(one) for one in told[:-1]]
    assert len(set(texts)) == len(texts)
    assert (seen["first"]["tab"], seen["first"]["asked"]) == (
        "tab-learning-rate",
        "1B 20B dense 1/1 2",
    )
    last = told[-1]
    assert last["asked"] == "70M 20B moe 8/2 3"
    assert last["pressed"] == "D N"
    assert last["filled"] == "from_loss=2.5"
    assert last["kept"] != seen["first"]["kept"]
    link = seen["copied"]
    assert "#" in link
    again = drive(
        ladder[1],
        SETTINGS + "await ready(); return shown();",
        fragment="#" + link.split("#")[1],
    )
    assert again == last
