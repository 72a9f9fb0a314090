"""Further hyperparameters (`search.also`): searched with the rest, their optimum found again."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raysweep.results import Results
from raysweep.results.schema import make_row
from raysweep.scaling.fit import fit
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import StudyScheduler
from raysweep.study import Study
from raysweep.training.record import spec_columns

ALSO = {"weight_decay": {"low": 0.01, "high": 1.0}}


def space(trials: int, **more: Any) -> dict[str, Any]:
    return {
        "study": "further",
        "training": {"external": True},
        "model": {"sequence_length": 64},
        "scales": [
            {"name": f"s{k}", "params": 1e6 * 4**k, "flops_per_token": 7e6 * 4**k} for k in range(3)
        ],
        "horizons": [{"tokens_per_param": 20}],
        "search": {"trials_per_cell": trials, "also": ALSO, "extend_edges": False},
        **more,
    }


def searched(study: Study, exponent: float, trials: int, depth: float = 0.01) -> pd.DataFrame:
    """Rows of a study with a planted optimum of weight decay: 0.1 at 4M, moving with N."""
    rng = np.random.default_rng(0)
    scheduler = StudyScheduler(study, study.own_data, ResourcePool({"here": {"CPU": 1.0}}))
    rows = []
    while (proposal := scheduler.ask(f"t{len(rows)}")) is not None and len(rows) < trials:
        spec = proposal.spec
        decay = dict(spec.also)["weight_decay"]
        n = spec.cell.counts.params_active_non_embedding
        best = 0.1 * (n / 4e6) ** exponent
        loss = 2.0 + 1.0 * (1e6 / n) ** 0.3
        loss *= 1 + 0.02 * math.log(spec.learning_rate / 0.004) ** 2
        loss *= 1 + depth * math.log(decay / best) ** 2 + 0.001 * rng.normal()
        scheduler.tell(proposal.id, "finished", loss)
        more = {"status": "finished", "loss": loss, "tokens_seen": spec.cell.tokens}
        rows.append(make_row(**spec_columns(spec), **more))
    return pd.DataFrame(rows)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.0, 0.8])
def test_a_planted_optimum_is_found_and_whether_it_moves(exponent: float) -> None:
    frame = searched(Study.from_dict(space(12)), exponent, 36)
    decays = [json.loads(text)["weight_decay"] for text in frame["recipe"]]
    assert len(set(decays)) > 25
    # The search goes where it is best: later trials nearer than the first ones.
    best = 0.1 * (frame["params_active_non_embedding"].to_numpy() / 4e6) ** exponent
    off = np.abs(np.log(np.array(decays) / best))
    assert np.median(off[18:]) < 0.7 * np.median(off[:9])
    fits = fit(frame)
    (found,) = fits.hyperparameters[""].values()
    assert found.name == "weight_decay"
    assert found.status == "inside"
    assert found.optimum.low < 0.1 * (found.params / 4e6) ** exponent < found.optimum.high
    assert found.optimum.high / found.optimum.low < 4
    assert found.exponent.covers(exponent)
    assert found.moves == bool(exponent)
    assert "weight_decay: best at" in fits.summary()
    assert fits.to_dict()["hyperparameters"]


@pytest.mark.slow
def test_a_hyperparameter_without_effect_is_called_flat() -> None:
    frame = searched(Study.from_dict(space(8)), 0.0, 24, depth=0.0)
    (found,) = fit(frame).hyperparameters[""].values()
    assert found.status == "flat"
    assert not found.moves


def test_a_study_goes_on_with_its_further_values(tmp_path: Path) -> None:
    study = Study.from_dict(space(3))
    results = Results.open(tmp_path / "results", create=True)
    for row in searched(study, 0.0, 5).to_dict("records"):
        results.write({str(name): value for name, value in row.items()})
    rows = results.to_pandas()
    scheduler = StudyScheduler(
        study, study.own_data, ResourcePool({"here": {"CPU": 1.0}}), rows=rows
    )
    states = list(scheduler.states.values())
    assert [state.finished for state in states] == [3, 2, 0]
    assert [state.wanted for state in states] == [0, 1, 3]


def test_of_our_own_models_it_is_a_number_of_the_recipe() -> None:
    given = {
        "study": "ours",
        "scales": [{"d_model": 8, "layers": 1, "heads": 1}],
        "horizons": [{"tokens": 1e6}],
        "search": {"also": ALSO},
    }
    study = Study.from_dict(given)
    specs = [study.trial(study.cells[0], "d", 0.1, 4, 0, {"weight_decay": w}) for w in (0.1, 0.2)]
    assert specs[1].recipe.weight_decay == 0.2
    plain = Study.from_dict(given | {"search": {}})
    assert specs[0].key == plain.trial(plain.cells[0], "d", 0.1, 4, 0).key  # the default
    assert specs[1].key != specs[0].key
    for name, says in (("weight_deca", "is no number of recipe"), ("beta1", "less than 1")):
        with pytest.raises(ValueError, match=says):
            Study.from_dict(given | {"search": {"also": {name: {"low": 0.5, "high": 1.5}}}})
