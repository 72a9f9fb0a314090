"""Tables of odd kinds, drawn, go through import, fit, recommend, score, compare and the report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raysweep.errors import UserError
from raysweep.report.write import write_report
from raysweep.results.importers import import_results
from raysweep.scaling.fit import fit
from raysweep.scaling.sides import compare

USUAL: dict[str, Any] = {
    "sizes": 2, "horizons": 2, "trials": 4, "groups": 1, "rates": 4, "batches": 3, "told": True,
    "interior": True, "experts": 1, "broken": 0.0, "seed": 0,
}  # fmt: skip
KINDS = st.fixed_dictionaries(
    {
        "sizes": st.integers(1, 3),
        "horizons": st.integers(1, 3),
        "trials": st.integers(1, 4),
        "groups": st.sampled_from([1, 2, 3]),
        "rates": st.sampled_from([1, 2, 4]),
        "batches": st.sampled_from([1, 2, 4]),
        "told": st.booleans(),
        "interior": st.booleans(),
        "experts": st.sampled_from([1, 1, 8]),
        "broken": st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        "seed": st.integers(0, 100),
    }
)


def drawn(kind: dict[str, Any]) -> pd.DataFrame:
    """A table with the columns of somebody's spreadsheet."""
    rng = np.random.default_rng(kind["seed"])
    rows = []
    for size in 3e7 * 3.0 ** np.arange(kind["sizes"]):
        for ratio in 20 * 2.0 ** np.arange(kind["horizons"]):
            for group in range(kind["groups"]):
                for _ in range(kind["trials"]):
                    u = rng.integers(kind["rates"]) - (kind["rates"] - 1) / 2
                    v = rng.integers(kind["batches"]) - (kind["batches"] - 1) / 2
                    off = 0.0 if kind["interior"] else 6.0
                    loss = 1.7 + 420 / size**0.34 + 1700 / (size * ratio) ** 0.36
                    loss *= 1 + 0.01 * ((u - off) ** 2 + v**2) + 0.003 * group
                    rows.append(
                        {
                            "n_params": size,
                            "train_tokens": size * ratio * (1 + rng.uniform(-1, 1) / 1000),
                            "lr": 1e-3 * 2**u,
                            "batch_tokens": 2.0**18 * 2**v,
                            "optimizer": f"o{group}",
                            "n_experts": kind["experts"],
                            "top_k": min(2, kind["experts"]),
                            "val_loss": loss * (1 + 0.001 * rng.standard_normal()),
                        }
                    )
    table = pd.DataFrame(rows)
    table.loc[rng.random(len(table)) < kind["broken"], "val_loss"] = np.nan
    return table if kind["told"] else table.drop(columns=["lr", "batch_tokens"])


@pytest.mark.slow
@given(kind=KINDS)
@example(kind={**USUAL, "interior": False})
@example(kind={**USUAL, "batches": 1})
@example(kind={**USUAL, "rates": 1})
@example(kind={**USUAL, "rates": 1, "batches": 1})
@example(kind={**USUAL, "groups": 11, "horizons": 1, "trials": 2})
@example(kind={**USUAL, "sizes": 1, "horizons": 1})
@example(kind={**USUAL, "sizes": 1, "horizons": 1, "trials": 1})
@example(kind={**USUAL, "told": False})
@example(kind={**USUAL, "broken": 1.0})
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_every_kind_of_table_gets_its_page(kind: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.rmtree(folder, ignore_errors=True)
    table = drawn(kind)
    results = import_results(table, folder / "results")
    assert len(results) == len(table)
    fits = fit(results, group="optimizer")
    assert str(fits)
    counted = kind["broken"] < 1
    if counted and len(fits.table.trials):
        answer = fits.recommend(params="1B", tokens="20B")
        assert str(answer)
        assert answer.loss > 1 or not np.isfinite(answer.loss)
        score = fits.score(table)
        assert score.overall.n + sum(score.skipped.values()) == len(table)
        if kind["groups"] > 1:
            found = compare(results, group="optimizer")
            assert len(found.arms) == len(fits.groups(fits.architectures[0]))
            assert str(found)
    else:
        with pytest.raises(UserError, match="nothing to recommend from"):
            fits.recommend(params="1B", tokens="20B")
    page = write_report(results, folder / "page", fits=fits).read_text()
    assert "</html>" in page
