"""The forecast of a ladder's largest scale against its outcome, on a planted ladder."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.forecast import conclude
from raysweep.results import Results
from raysweep.results.schema import row_table
from raysweep.scaling.fit import fit
from raysweep.scaling.forecast import forecast
from raysweep.study import Study
from tests.report.conftest import Page, Row, planted_row

LADDER = Path(__file__).parents[2] / "reports/examples/ladder/ladder.yaml"


def rows_of(study: Study, trials: int) -> list[Row]:
    """Planted trials of the study's own cells."""
    rng = np.random.default_rng(0)
    rows = []
    for cell in study.cells:
        counts, experts = cell.counts, cell.shape.experts
        size = float(counts.params_active_non_embedding), float(cell.tokens)
        for trial in range(trials):
            row = planted_row(rng, cell.architecture, experts, 0, 0, *size, trial)
            own = {"trial_key": f"{cell.name}-{trial}".replace(".", "_"), "cell": cell.name}
            rows.append(row | own | {"scale": cell.scale, "study": study.name})
    return rows


@pytest.mark.slow
def test_forecast_and_outcome_side_by_side(tmp_path: Path) -> None:
    """The shipped ladder, planted: forecast of its smaller scales, outcome of all, on the page."""
    study = Study.load(LADDER)
    rows = rows_of(study, 9)
    results = Results.open(tmp_path / "results", create=True)
    results.write_many(row_table([r for r in rows if r["scale"] != "xl"]).to_pandas())
    told = forecast(fit(results), study, "xl")
    told["written"] = "2026-01-02 03:04 UTC"
    other = told["cells"]["moe-xl-10tpp"]
    other["loss"] = {"value": 1.0, "low": 0.9, "high": 1.1}  # a forecast that does not come true
    results.save_forecast(told)
    assert set(told["cells"]) == {c.name for c in study.cells if c.scale == "xl"}
    cell = "dense-xl-10tpp"
    rate = told["cells"][cell]["learning_rate"]
    n, d = rows[-1]["params_active_non_embedding"], rows[-1]["tokens"]
    assert rate["low"] < rate["value"] < rate["high"]

    results.write_many(row_table([r for r in rows if r["scale"] == "xl"]).to_pandas())
    own = [r for r in rows if r["cell"] == cell and r["status"] == "finished"]
    best = min(own, key=lambda r: r["loss"])
    check = Results.open(tmp_path / "check", create=True)
    again = [best | {"trial_key": f"c{k}", "loss": best["loss"] * s} for k, s in
             enumerate((1.001, 1.003))]  # fmt: skip
    check.write_many(row_table(again).to_pandas())
    page = Page(conclude(tmp_path))

    found = results.forecast()[1]["cells"][cell]
    assert found["trials"] == len(own)
    assert found["checked"] == 2
    assert found["best"] == {q: best[q] for q in ("learning_rate", "batch_tokens", "loss")}
    assert found["regret"] == pytest.approx(0.002)
    assert 0 < found["regret_sd"] < 0.01
    assert abs(found["loss_error"]) < 0.02
    assert found["learning_rate"]["value"] == pytest.approx(0.6 * n**-0.4 * d**0.05, rel=0.3)
    inside = {q: told["cells"][cell][q] for q in found["inside"]}
    assert found["inside"] == {
        q: e["low"] <= found[q]["value"] <= e["high"] for q, e in inside.items()
    }
    assert not results.forecast()[1]["cells"]["moe-xl-10tpp"]["inside"]["loss"]
    assert "Scale xl was forecast on 2026-01-02 03:04 UTC" in page.text
    assert "forecast" in page.ids
    assert "+0.20% ±" in page.text
    assert "+0.20% ±" in (tmp_path / "outcome.md").read_text()
