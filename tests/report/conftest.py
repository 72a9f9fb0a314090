"""Studies with planted optima, and results folders made of them, for the tests of the report."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysweep.results.schema import make_row, row_table
from raysweep.results.store import Results
from raysweep.scaling.fits import Fits

SPACE = """study: ladder
description: Planted optima, dense and MoE.
architectures: {dense: {}, moe: {experts: 8, top_k: 2}}
targets:
  - {architecture: dense, params: 1e9, tokens: 2e10}
  - {architecture: moe, params: 1e9, tokens: 2e10}
"""

Row = dict[str, Any]


def planted(
    architectures: tuple[str, ...] = ("dense", "moe"),
    scales: int = 4,
    horizons: int = 1,
    trials: int = 9,
    smallest: float = 2e5,
    **override: Any,
) -> list[Row]:
    """Rows around a known valley, one in nine diverged; `override` sets columns of all rows.

    An architecture whose name has a number has so many experts; `moe` has 8."""
    rng = np.random.default_rng(0)
    rows = []
    for architecture in architectures:
        experts = int("".join(filter(str.isdigit, architecture)) or 8)
        experts = experts if architecture.startswith("moe") else 1
        for scale in range(scales):
            for horizon in range(horizons):
                params = smallest * 4.0 ** (scale % 8) * (1 + 0.01 * (scale // 8))
                tokens = params * 20 * 3.0**horizon
                for trial in range(trials):
                    rows.append(
                        planted_row(
                            rng, architecture, experts, scale, horizon, params, tokens, trial
                        )
                        | override
                    )
    return rows


def planted_row(
    rng: np.random.Generator,
    architecture: str,
    experts: int,
    scale: int,
    horizon: int,
    params: float,
    tokens: float,
    trial: int,
) -> Row:
    moe = experts > 1
    best_rate = 0.6 * params**-0.4 * tokens**0.05 * (1.3 if moe else 1.0)
    best_batch = 0.58 * tokens**0.571 * (0.7 if moe else 1.0)
    sequences = int(2 ** max(0, round(np.log2(best_batch / 64) + rng.uniform(-2.5, 2.5))))
    rate = best_rate * np.exp(rng.uniform(-1.8, 1.8))
    u, v = np.log(rate / best_rate), np.log(sequences * 64 / best_batch)
    floor = 1.6 + 30 / params**0.32 * experts**-0.0725 + 60 / tokens**0.34
    loss = float(floor * np.exp(0.018 * u * u + 0.014 * v * v - 0.012 * u * v))
    loss *= float(np.exp(rng.normal(0, 0.001)))
    lost = trial % 9 == 8
    total = params * (1 + 0.66 * (experts / 2 - 1)) if moe else params
    measured = moe and not lost
    name = f"{architecture}-{scale}-{horizon}"
    return make_row(
        trial_key=hashlib.sha256(f"{name}-{trial}".encode()).hexdigest()[:20],
        study="ladder",
        cell=name,
        architecture=architecture,
        architecture_kind="moe" if moe else "dense",
        scale=f"s{scale}",
        source="raysweep",
        sequence_length=64,
        experts=experts,
        top_k=2 if moe else 1,
        params_active_non_embedding=params,
        params_total_non_embedding=total,
        params_active=params + 32768,
        params_total=total + 32768,
        params_dense=params,
        flops_per_token=6.6 * params,
        flops=6.6 * params * tokens,
        tokens=tokens,
        learning_rate=float(rate),
        batch_sequences=sequences,
        batch_tokens=sequences * 64.0,
        seed=trial % 3,
        status="diverged" if lost else "finished",
        reason="the loss is not finite at step 41" if lost else None,
        loss=None if lost else loss,
        loss_se=None if lost else 0.002,
        tokens_seen=tokens,
        noise_scale_tokens=None if lost else float(best_batch * np.exp(rng.normal(0, 0.1))),
        expert_load_entropy=0.95 + 0.002 * trial if measured else None,
        expert_load_max_over_mean=1.6 - 0.02 * trial if measured else None,
        router_confidence=0.4 if measured else None,
        seconds_train=params * tokens / 3e12,
        tokens_per_second=3e5,
        started_at=datetime(2025, 5, 1, 9, tzinfo=UTC) + timedelta(minutes=trial),
        world_size=1,
        device="test machine",
        versions=json.dumps({"torch": "2.13.0"}),
        git_revision="1a2b3c4",
        data_hash="9f8e7d6c",
    )


RUN = {
    "study": "ladder",
    "started_at": "2025-05-01T09:00:00+00:00",
    "seconds": 500.0,
    "workers": 2.0,
    "worker_seconds_available": 1000.0,
    "worker_seconds_training": 912.0,
    "trials": 72,
    "cpus": 2.0,
    "gpus": 0.0,
    "strategy": "ladder",
    "versions": {"ray": "2.60.0"},
}


def results_of(
    folder: Path, rows: list[Row], space: str | None = None, runs: tuple[Row, ...] = ()
) -> Results:
    """A results folder that holds these rows."""
    results = Results.open(folder, create=True)
    if rows:
        results.write_many(row_table(rows).to_pandas())
    if space is not None:
        results.save_search_space("ladder", space)
    for run in runs:
        results.save_run(run)
    return results


def curve_of(row: Row) -> dict[str, list[float]]:
    """A loss curve that falls from 5 to the row's loss."""
    share = np.linspace(0.05, 1, 20)
    return {
        "step": [int(100 * s) for s in share],
        "tokens": [float(row["tokens"] * s) for s in share],
        "train_loss": [float(row["loss"] + (5 - row["loss"]) * (1 - s) ** 2) for s in share],
        "learning_rate": [float(row["learning_rate"] * s) for s in share],
        "grad_norm": [1.0] * len(share),
    }


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Row]]:
    """`planted`, for tests that build rows of their own."""
    return planted


INLINE = {"a", "b", "button", "code", "i", "option", "output", "select", "span", "strong", "svg"}


class Page(HTMLParser):
    """A page taken apart: its ids, links, tags, words, sentences and JSON."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.json: dict[str, Any] = {}
        self.words: list[str] = []
        self._blocks = [""]
        self._apart = 0
        self._json: str | None = None
        self._quiet = False
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.handlers += [name for name in given if name.startswith("on")]
        self.ids += [str(given["id"])] if given.get("id") else []
        self.links += [str(given[a]) for a in ("href", "src", "action") if given.get(a)]
        held = given.get("type") == "application/json" or given.get("id") == "figures"
        self._json = given.get("id") if held else None
        self._quiet = tag in ("script", "style")
        self._apart += tag in ("svg", "pre")
        if tag not in INLINE:
            self._blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._json = None
        self._quiet = False
        self._apart -= tag in ("svg", "pre")
        if tag not in INLINE:
            self._blocks.append("")

    def handle_data(self, data: str) -> None:
        if self._json is not None:
            text = gzip.decompress(base64.b64decode(data)) if self._json == "figures" else data
            self.json[self._json] = json.loads(text)
        if not self._quiet:
            self.words.append(data)
            self._blocks[-1] += "" if self._apart else data

    @property
    def sentences(self) -> list[str]:
        """Sentences of eight words and more, without those of figures and files."""
        texts = [re.sub(r"\s+", " ", block) for block in self._blocks]
        parts = [part.strip() for text in texts for part in re.split(r"(?<=[.;!?]) ", text)]
        return [part for part in parts if len(re.findall(r"[^\W\d_]{2,}", part)) >= 8]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="session")
def open_page() -> type[Page]:
    """Takes a page apart."""
    return Page


@pytest.fixture
def make_results(tmp_path: Path) -> Callable[..., Results]:
    """Rows -> an open results folder."""
    return lambda rows, **more: results_of(tmp_path / "results", rows, **more)


@pytest.fixture(scope="session")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fits, Path]:
    """A dense and a MoE ladder with targets and a run: what was fitted, and the page of it."""
    from raysweep.report import report
    from raysweep.scaling.fit import fit

    folder = tmp_path_factory.mktemp("ladder")
    rows = planted()
    results = results_of(folder / "results", rows, SPACE, (RUN,))
    for row in rows[:5]:
        results.write(row, curve_of(row))
    fits = fit(results.to_pandas())
    return fits, report(results, folder / "report", fits=fits)


# --- a browser ---------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--window-size=1200,900",
    "--virtual-time-budget=1000000",
)
WATCH = """<script>
window.seen = { errors: [], blocked: [] };
addEventListener("error", (e) => seen.errors.push(String(e.message)));
addEventListener("unhandledrejection", (e) => seen.errors.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => seen.blocked.push(e.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...all) => seen.errors.push(all.join(" "));
</script>"""
HARNESS = """<script>
addEventListener("load", async () => {
  let result;
  try {  // `form`, `set` and `out` are the calculator's, for any script that has none of its own
    const form = document.getElementById("ask");
    const set = (name, value) => {
      form.elements[name].value = value;
      form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
    };
    const out = (name) => document.querySelector(`[data-out="${name}"]`).textContent;
    result = await (async () => { %s })();
  } catch (e) { seen.errors.push(String(e)); }
  const loaded = performance.getEntriesByType("resource").map((e) => e.name);
  const out = document.createElement("script");
  out.type = "application/json";
  out.id = "driven";
  out.textContent = JSON.stringify({ result, loaded, ...seen }).replaceAll("<", "\\\\u003c");
  document.body.append(out);
});
</script>"""

Drive = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a Chromium."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser found: install one of {', '.join(BROWSERS)}")
    return found


@pytest.fixture
def drive(browser: str, tmp_path: Path) -> Drive:
    """drive(page, script, *flags): open a page from disk, run the body of an async function in it.

    `fragment` is put behind its address. Returns what the script returns.
    Fails on a console error, and on any attempt to load anything.
    """

    def run(page: Path, script: str, *flags: str, before: str = "", fragment: str = "") -> Any:
        html = page.read_text()
        html = html.replace("<head>", "<head>" + WATCH, 1)
        html = html.replace("</body>", before + HARNESS % script + "</body>", 1)
        copy = tmp_path / "driven.html"
        copy.write_text(html)
        profile = tmp_path / "profile"
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom"]
        done = subprocess.run(
            [*command, copy.as_uri() + fragment],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        found = re.search(
            r'<script type="application/json" id="driven">(.*?)</script>', done.stdout
        )
        assert found, f"the page did not finish: {done.stderr[-2000:]}"
        seen = json.loads(found.group(1))
        assert seen["errors"] == []
        assert seen["blocked"] == []
        assert seen["loaded"] == []
        return seen.get("result")

    return run
