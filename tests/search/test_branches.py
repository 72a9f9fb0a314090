"""A scheduler of WSD branches: one proposal gives a row in every horizon's cell of its scale."""

import math
from pathlib import Path

import pandas as pd
import pytest

from raysweep.results.schema import COLUMNS
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import StudyScheduler
from raysweep.study import Study
from raysweep.study.plan import make_plan

SPACE = {
    "study": "branched",
    "architectures": {"dense": {}, "moe": {"experts": 8, "top_k": 2}},
    "model": {"sequence_length": 64},
    "scales": [
        {"name": "xs", "d_model": 16, "layers": 2, "heads": 2},
        {"name": "s", "d_model": 32, "layers": 2, "heads": 2},
    ],
    "horizons": [{"tokens_per_param": 80}, {"tokens_per_param": 20}, {"tokens_per_param": 40}],
    "recipe": {"schedule": "wsd", "warmup_tokens": 4096, "branches": True},
    "search": {
        "trials_per_cell": 4,
        "learning_rate": {"low": 1e-4, "high": 1e-1},
        "batch_sequences": {"low": 4, "high": 256},
    },
}


def make_study(**search) -> Study:
    return Study.from_dict({**SPACE, "search": {**SPACE["search"], **search}})


def loss(cell, spec) -> float:
    u = math.log(spec.learning_rate / 1e-2)
    v = math.log(spec.batch_sequences / 16)
    size = cell.counts.params_active_non_embedding
    return 2.0 + 10 * size**-0.3 + 100 / cell.tokens**0.5 + 0.03 * u**2 + 0.01 * v**2


def row(study, cell, spec, status="finished") -> dict[str, object]:
    trial = study.trial(cell, "data", spec.learning_rate, spec.batch_sequences, spec.seed)
    return dict.fromkeys(COLUMNS) | {
        "study": study.name,
        "cell": cell.name,
        "trial_key": trial.key,
        "learning_rate": spec.learning_rate,
        "batch_sequences": spec.batch_sequences,
        "seed": spec.seed,
        "status": status,
        "loss": loss(cell, spec),
    }


def simulate(study, scheduler, *, stop_after=math.inf) -> list[dict[str, object]]:
    """One trial after another; the last one before a stop leaves its branches' rows only."""
    rows, number = [], 0
    while not scheduler.done:
        proposal = scheduler.ask(f"t{number}")
        assert proposal is not None
        number += 1
        spec, branches = proposal.spec, study.branches(proposal.spec.cell)
        rows += [row(study, cell, spec) for cell in branches]
        if number >= stop_after:
            break
        rows.append(row(study, spec.cell, spec))
        told = [(c.name, "finished", loss(c, spec)) for c in branches]
        scheduler.tell(proposal.id, "finished", loss(spec.cell, spec), told)
    return rows


def scheduler_of(study, rows=None) -> StudyScheduler:
    frame = None if rows is None else pd.DataFrame(rows, columns=list(COLUMNS))
    return StudyScheduler(study, "data", ResourcePool({"n": {"CPU": 1.0}}), rows=frame)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ladder", "tpe", "qmc"])
def test_every_cell_gets_its_rows_from_trials_of_the_longest(strategy) -> None:
    study = make_study(strategy=strategy, extend_edges=False)
    frame = pd.DataFrame(simulate(study, scheduler_of(study)))
    assert frame["cell"].value_counts().to_dict() == {c.name: 4 for c in study.cells}
    assert frame["trial_key"].is_unique
    points = ["learning_rate", "batch_sequences", "seed"]
    for group in ("dense-xs", "dense-s", "moe-xs", "moe-s"):
        cells = frame[frame["cell"].str.startswith(group)].groupby("cell")
        same = [cell[points].to_numpy().tolist() for _, cell in cells]
        assert len(same) == 3
        assert same[0] == same[1] == same[2]
    steps = frame["batch_sequences"] * 64
    trunks = {c.name: study.stable_run(c) for c in study.cells}
    shortest = {name: study.branches(stable_run)[0].tokens for name, stable_run in trunks.items()}
    assert (frame["cell"].map(shortest) / steps).min() >= 8


def test_rows_of_branches_teach_their_cells() -> None:
    study = make_study(extend_edges=False)
    scheduler = scheduler_of(study)
    simulate(study, scheduler, stop_after=5)
    groups: dict[tuple[str, str], set[int]] = {}
    for state in scheduler.states.values():
        group = state.cell.architecture, state.cell.scale
        groups.setdefault(group, set()).add(state.finished)
    assert sorted(map(sorted, groups.values())) == [[0], [0], [0], [4]]


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_first_and_repeats_no_rows() -> None:
    """Its branches' rows stand, its own does not: the same point comes again."""
    study = make_study(extend_edges=False)
    before = simulate(study, scheduler_of(study), stop_after=3)
    left = before[-1]
    scheduler = scheduler_of(study, before)
    proposal = scheduler.ask("again")
    assert proposal is not None
    spec = proposal.spec
    assert spec.cell == study.stable_run(spec.cell)
    assert (spec.learning_rate, spec.batch_sequences, spec.seed) == (
        left["learning_rate"], left["batch_sequences"], left["seed"]
    )  # fmt: skip
    scheduler.tell("again", "finished", loss(spec.cell, spec))
    rest = simulate(study, scheduler)
    frame = pd.DataFrame([*before, row(study, spec.cell, spec), *rest])
    assert frame["trial_key"].is_unique
    assert frame["cell"].value_counts().to_dict() == {c.name: 4 for c in study.cells}
    assert scheduler_of(study, frame.to_dict("records")).done


@pytest.mark.slow
def test_a_budget_of_flops_counts_the_shared_phase_once() -> None:
    study = make_study()
    longest = [c for c in study.cells if c == study.stable_run(c)]
    assert len(longest) == 4
    for cell in longest:
        whole = sum(study.flops(c) for c in (cell, *study.branches(cell)))
        assert whole == pytest.approx(cell.flops * (1 + 0.2 * (0.25 + 0.5)), rel=1e-6)
    cost = sum(4 * study.flops(c) for c in study.cells)
    study = make_study(total_flops=0.5 * cost, extend_edges=False)
    rows = simulate(study, scheduler_of(study))
    spent = sum(study.flops(study.cell(str(r["cell"]))) for r in rows)
    assert 0.2 * cost < spent <= 0.5 * cost
    again = scheduler_of(study, rows)
    assert again._flops_spent == pytest.approx(spent)


@pytest.mark.slow
def test_ranges_of_a_scale_widen_together() -> None:
    study = make_study(learning_rate={"low": 1e-4, "high": 1e-3})
    scheduler = scheduler_of(study)
    rows = simulate(study, scheduler)
    stable_run = scheduler.states[study.stable_run(study.cells[0]).name]
    assert stable_run.extensions > 0
    assert all(b.bounds == stable_run.bounds for b in stable_run.branches)
    assert len(rows) % 3 == 0
    assert max(float(str(r["learning_rate"])) for r in rows) > 1e-3


def test_the_plan_counts_the_shared_phase_once() -> None:
    study = make_study(first_cell_trials=6)
    plan = make_plan(study)
    planned = {c.name: c for c in plan.cells}
    for cell in study.cells:
        assert planned[cell.name].flops_per_trial == study.flops(cell)
        assert planned[cell.name].trials == (6 if cell.scale == "xs" else 4)


@pytest.mark.ray
def test_on_a_real_ray_with_a_range_that_widens(tmp_path: Path) -> None:
    """The widened range is kept beside the rows and taken up; a finished study stays so."""
    from raysweep.results import Results
    from raysweep.search.run import run

    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"document {i}: " + f"{i * 7919} words of it. " * 60)
    uri = str(tmp_path / "results")

    def make(trials: int) -> Study:
        space = {
            "study": "branched",
            "model": {"sequence_length": 16},
            "scales": [{"d_model": 8, "layers": 1, "heads": 1}],
            "horizons": [{"tokens": 4000}, {"tokens": 8000}],
            "recipe": {"schedule": "wsd", "warmup_tokens": 512, "branches": True},
            "search": {
                "strategy": "qmc",
                "trials_per_cell": trials,
                "max_extensions": 1,
                "learning_rate": {"low": 1e-5, "high": 1e-4},
                "batch_sequences": {"low": 4, "high": 8},
            },
            "data": {"source": "text", "paths": [str(text)], "validation_sequences": 8},
        }
        return Study.from_dict(space)

    study = make(4)
    summary = run(study, results_uri=uri)
    results = Results.open(uri)
    frame = results.to_pandas()
    assert summary.started == 4 + 2
    assert frame["cell"].value_counts().to_dict() == {c.name: 6 for c in study.cells}
    assert (frame["status"] == "finished").all()
    short, long = (frame[frame["tokens"] == t].set_index("seed") for t in (4000, 8000))
    assert set(short["learning_rate"]) == set(long["learning_rate"])
    assert (short["tokens_trained"] < 0.25 * short["tokens_seen"]).all()
    assert (long["tokens_trained"] == long["tokens_seen"]).all()
    assert set(results.curves()["trial_key"]) == set(frame["trial_key"])
    kept = results.ranges("branched")["cells"].values()
    assert [k["learning_rate"][1] for k in kept] == pytest.approx([4e-4] * 2)
    assert [k["extensions"] for k in kept] == [0, 1], "counted by the stable_run's cell"
    assert run(study, results_uri=uri).started == 0
    assert run(make(6), results_uri=uri).started == 2
    (tmp_path / "results" / "studies" / "branched.ranges.json").write_text("damaged")
    assert results.ranges("branched") == {}
    assert run(make(6), results_uri=uri).started == 0
