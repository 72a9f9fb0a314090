"""A page kept live: built again as rows land, loaded by open pages without losing one's place."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysweep.report import watch as watching
from raysweep.report.watch import LIVE, end_live, kept_live, watch
from raysweep.results.store import Results

Row = dict[str, Any]
SPACE = """study: ladder
architectures: {dense: {}}
model: {sequence_length: 64}
scales: [{name: a, d_model: 16, layers: 1, heads: 2}, {name: b, d_model: 32, layers: 1, heads: 2}]
horizons: [{tokens: 20000}]
search: {trials_per_cell: 3, learning_rate: {low: 1e-3, high: 1e-1},
         batch_sequences: {low: 2, high: 16}}
data: {source: machine}
"""
REPO = Path(__file__).resolve().parents[2]


def body(page: Path) -> str:
    found = re.search(r"<body[^>]*>", page.read_text())
    assert found
    return found.group()


def said(folder: Path) -> dict[str, Any]:
    text = (folder / LIVE).read_text()
    return json.loads(text.removeprefix("raysweepLive(").rstrip().removesuffix(");"))


@pytest.fixture
def study(tmp_path: Path) -> Results:
    results = Results.open(tmp_path / "results", create=True)
    results.save_search_space("ladder", SPACE)
    return results


@pytest.fixture
def rows(make_rows: Callable[..., list[Row]]) -> list[Row]:
    return make_rows(("dense",), scales=2, trials=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LEAST", 0.0)
    monkeypatch.setattr(watching, "SHARE", 1.0)


class Story:
    """A `pause` that lives through steps, one a look, and ends after the last."""

    def __init__(self, *steps: Callable[[], Any]) -> None:
        self.steps = list(steps)

    def __call__(self, seconds: float) -> bool:
        if not self.steps:
            return True
        self.steps.pop(0)()
        return False


@pytest.mark.slow
def test_page_is_built_when_rows_land_and_only_then(
    study: Results, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    built: list[str] = []
    real = watching.report

    def counted(*args: Any, **kwargs: Any) -> Path:
        page = real(*args, **kwargs)
        built.append(body(page))
        return page

    monkeypatch.setattr(watching, "report", counted)
    seen: list[Any] = []
    story = Story(
        lambda: seen.append(((folder / "index.html").read_text(), said(folder), len(built))),
        lambda: study.write(rows[0]),
        lambda: seen.append(((folder / "index.html").read_text(), said(folder), len(built))),
        lambda: None,
    )
    watch(study.uri, folder, pause=story)
    (first, told, one), (second, again, two) = seen
    # Without any trial the page says what is planned.
    assert "0 of 2 cells complete" in first
    assert "dense-a-20ktok" in first
    assert "0 of 3" in first
    assert (one, two, len(built)) == (1, 2, 2)
    assert f'data-live="{told["stamp"]}"' in first
    assert f'data-live="{again["stamp"]}"' in second
    assert told["stamp"] != again["stamp"]
    assert abs(again["at"] - time.time()) < 60
    # The callback has gone: the page stays, live no more.
    assert body(folder / "index.html") == "<body>"
    assert not (folder / LIVE).exists()


@pytest.mark.slow
def test_the_last_page_follows_the_end_of_the_run(
    study: Results, rows: list[Row], tmp_path: Path
) -> None:
    folder = tmp_path / "page"

    def finish() -> None:
        for row in rows:
            study.write(row)
        study.save_run({"study": "ladder", "started_at": "2025-05-01T09:00:00+00:00"})

    def never() -> None:
        raise AssertionError("the callback goes on after the run has ended")

    page = watch(study.uri, folder, pause=Story(finish, never))
    text = page.read_text()
    assert body(page) == "<body>"
    assert "dense-1-0" in text
    assert 'id="progress"' not in text


@pytest.mark.slow
def test_what_is_complete_is_built_once(study: Results, rows: list[Row], tmp_path: Path) -> None:
    for k, row in enumerate(rows):
        for name in ("a", "b"):
            study.write(row | {"cell": f"dense-{name}-20ktok", "trial_key": f"{name}{k}"})

    def never(seconds: float) -> bool:
        raise AssertionError("nothing is to be watched")

    page = watch(study.uri, tmp_path / "page", pause=never)
    assert body(page) == "<body>"


@pytest.mark.slow
def test_building_takes_a_bounded_share_of_the_time(
    study: Results, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SHARE", 0.1)
    clock, builds = [0.0], []
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])

    def slow(results: Results, folder: Path, **_: Any) -> Path:
        builds.append(clock[0])
        clock[0] += 5.0
        folder.mkdir(exist_ok=True)
        return folder / "index.html"

    monkeypatch.setattr(watching, "report", slow)
    keys = iter(range(1000))

    def pause(seconds: float) -> bool:
        clock[0] += seconds
        study.write(rows[0] | {"trial_key": f"k{next(keys)}"})
        return clock[0] > 160

    watch(study.uri, tmp_path / "page", pause=pause)
    gaps = [b - a for a, b in itertools.pairwise(builds)]
    assert len(builds) == 4
    assert min(gaps) >= 50


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(study: Results, rows: list[Row], tmp_path: Path) -> None:
    study.write(rows[0])
    folder = tmp_path / "reports" / "ladder"  # where it goes that nobody names a folder for
    child = subprocess.Popen(
        [sys.executable, "-m", "raysweep", "report", study.uri, "--watch"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if (folder / LIVE).exists():
            break
        time.sleep(0.1)
    assert "data-live" in body(folder / "index.html")
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "Traceback" not in error
    assert error.startswith(f"live: {(folder / 'index.html').as_uri()}")
    assert body(folder / "index.html") == "<body>"
    assert not (folder / LIVE).exists()


@pytest.mark.slow
def test_process_beside_a_run_ends_with_it(study: Results, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    with kept_live(study.uri, folder) as settle:
        for _ in range(600):
            if (folder / LIVE).exists():
                break
            time.sleep(0.1)
        assert "data-live" in body(folder / "index.html")
        settle()
        assert (folder / LIVE).exists()  # open pages still wait for the last one
    assert body(folder / "index.html") == "<body>"
    assert not (folder / LIVE).exists()
    end_live(folder / "nothing-there")


# --- in a browser ------------------------------------------------------------------------------

ACT = """<script>
window.errors = [];
addEventListener("error", (e) => errors.push(e.message ?? "not loaded"), true);
addEventListener("securitypolicyviolation", (e) => errors.push(e.blockedURI));
addEventListener("load", () => {
  const form = document.getElementById("ask"), table = document.getElementById("trial-filter");
  if (!history.state?.raysweep) {
    form.elements.params.value = "3.3M";
    form.elements.params.dispatchEvent(new Event("input", { bubbles: true }));
    form.elements.params.focus();
    table.elements.status.value = "finished";
    table.elements.status.dispatchEvent(new Event("input", { bubbles: true }));
    const heads = [...document.querySelectorAll("#trial-table th button")];
    const loss = heads.find((b) => b.textContent === "loss");
    loss.click(); loss.click();
    document.querySelector("#architectures details").open = true;
    document.getElementById("tab-loss").click();
    document.querySelector("#cells .cell .pick").click();
    document.getElementById("laws").scrollIntoView({ behavior: "instant" });
    return;
  }
  window.raysweepLive = () => {};  // one load is enough
  document.title = JSON.stringify({
    params: form.elements.params.value,
    rate: document.querySelector("[data-out=learning_rate]").textContent,
    status: table.elements.status.value,
    sort: document.querySelector("#trial-table th[aria-sort]").getAttribute("aria-sort"),
    open: document.querySelector("#architectures details").open,
    tab: document.querySelector(".tabs > input:checked").id,
    cell: [...document.querySelectorAll("#cells .cell")].findIndex((c) => c.matches(".on")),
    focus: document.activeElement.name,
    at: document.getElementById("laws").getBoundingClientRect().top,
    y: scrollY,
    errors: window.errors,
  });
});
</script>"""


def titled(browser: str, page: Path, profile: Path) -> Any:
    """Open a page from disk in real time, and wait until it tells JSON in its title."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--window-size=1200,900", "--remote-debugging-port=0"]
    child = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", page.as_uri()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            time.sleep(0.1)
            port = profile / "DevToolsActivePort"
            if not port.exists() or not (said := port.read_text().split()):
                continue
            address = f"http://127.0.0.1:{said[0]}/json/list"
            with urllib.request.urlopen(address, timeout=10) as answer:
                titles = [
                    html.unescape(t["title"]) for t in json.load(answer) if t["type"] == "page"
                ]
            if titles and titles[0].startswith("{"):
                return json.loads(titles[0])
    finally:
        child.terminate()
        child.wait()
    raise AssertionError("the page did not load the newer one")


@pytest.mark.browser
def test_open_page_loads_the_newer_one_and_keeps_ones_place(
    browser: str, ladder: tuple[Any, Path], tmp_path: Path
) -> None:
    results = ladder[1].parents[1] / "results"
    folder = tmp_path / "page"
    seen: list[str] = []
    watch(
        results,
        folder,
        pause=Story(lambda: seen.append((folder / "index.html").read_text())),
    )
    page = folder / "index.html"
    page.write_text(seen[0].replace("</body>", ACT + "</body>", 1))
    newer = json.dumps({"stamp": "newer", "at": time.time()})
    (folder / LIVE).write_text(f"raysweepLive({newer});")
    kept = titled(browser, page, tmp_path / "profile")
    assert kept["errors"] == []
    assert kept["params"] == "3.3M"
    assert float(kept["rate"]) > 0
    assert kept["status"] == "finished"
    assert kept["sort"] == "descending"
    assert kept["open"] is True
    assert kept["focus"] == "params"
    assert (kept["tab"], kept["cell"]) == ("tab-loss", 0)
    assert kept["y"] > 500
    assert abs(kept["at"]) < 120
