"""The ladder sampler in plain Optuna: history, parallel proposals, failures, what it reaches."""

import logging

import numpy as np
import optuna
import pytest
import ray.cloudpickle as cloudpickle
from optuna.trial import TrialState, create_trial

from benchmarks.planted import SHAPES, held, plant, recommended_gaps, search
from raysweep.errors import UserError
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.search.strategies import make_sampler, search_space
from raysweep.study.shape import RunSize

SEQUENCE = 256
RATES, BATCHES = (1e-4, 1e-1), (0, 9)
SPACE = search_space(RATES, BATCHES)
CELLS = [
    RunSize(name=f"c{i}", params_active_non_embedding=1e6 * 4.0**i, tokens=2e7 * 4.0**i)
    for i in range(4)
]


def add_cell(history: TrialHistory, cell: RunSize, seed: int = 0) -> optuna.Study:
    sampler = make_sampler(
        "ladder",
        cell=cell,
        history=history,
        learning_rate=RATES,
        log2_batch=BATCHES,
        sequence_length=SEQUENCE,
        trials=4,
        seed=seed,
    )
    study = optuna.create_study(sampler=sampler)
    history.register(cell, study, sequence_length=SEQUENCE)
    return study


def true_loss(cell: RunSize, params: dict) -> float:
    n = np.log(cell.params_active_non_embedding / 1e6)
    u = np.log(params[LEARNING_RATE]) - np.log(0.01) + 0.4 * n
    v = np.log(SEQUENCE * 2.0 ** params[LOG2_BATCH]) - np.log(4000) - 0.4 * n
    return 3 * np.exp(-0.05 * n + 0.01 * u**2 + 0.006 * v**2)


def run(study: optuna.Study, cell: RunSize, count: int) -> list[dict]:
    asked = []
    for _ in range(count):
        trial = study.ask(SPACE)
        study.tell(trial, true_loss(cell, trial.params))
        asked.append(trial.params)
    return asked


@pytest.mark.slow
def test_deterministic_given_seed_and_history():
    def replay(seed: int) -> list[dict]:
        history = TrialHistory()
        studies = [add_cell(history, cell, seed) for cell in CELLS[:2]]
        return run(studies[0], CELLS[0], 4) + run(studies[1], CELLS[1], 3)

    assert replay(1) == replay(1)
    assert replay(1) != replay(2)


def test_a_ladder_rebuilt_from_rows_proposes_what_the_live_one_does():
    live = TrialHistory()
    studies = [add_cell(live, cell) for cell in CELLS[:2]]
    rows = [run(studies[0], CELLS[0], 5), run(studies[1], CELLS[1], 2)]
    rebuilt = TrialHistory()
    again = [add_cell(rebuilt, cell) for cell in CELLS[:2]]
    for cell, study, params in zip(CELLS, again, rows, strict=False):
        for one in params:
            study.add_trial(
                create_trial(params=one, distributions=SPACE, value=true_loss(cell, one))
            )
    assert studies[1].ask(SPACE).params == again[1].ask(SPACE).params


@pytest.mark.slow
def test_small_cells_place_the_first_trial_of_a_large_one():
    history = TrialHistory()
    studies = [add_cell(history, cell) for cell in CELLS]
    run(studies[0], CELLS[0], 8)
    run(studies[1], CELLS[1], 4)
    run(studies[2], CELLS[2], 4)
    first = studies[3].ask(SPACE)
    lowest = 3 * np.exp(-0.05 * np.log(CELLS[3].params_active_non_embedding / 1e6))
    assert true_loss(CELLS[3], first.params) / lowest - 1 < 0.01


def test_imported_rows_teach_as_trials_do():
    rng = np.random.default_rng(0)
    history = TrialHistory()
    for cell in CELLS[:3]:
        rate = np.exp(rng.normal(np.log(0.005), 0.8, 30))
        log2 = rng.uniform(2, 8, 30)
        loss = [
            true_loss(cell, {LEARNING_RATE: r, LOG2_BATCH: b})
            for r, b in zip(rate, log2, strict=True)
        ]
        history.add_imported(cell, rate, SEQUENCE * 2**log2, np.array(loss))
    study = add_cell(history, CELLS[3])
    first = study.ask(SPACE)
    lowest = 3 * np.exp(-0.05 * np.log(CELLS[3].params_active_non_embedding / 1e6))
    assert true_loss(CELLS[3], first.params) / lowest - 1 < 0.004
    assert history.surface().trials.tolist() == [30, 30, 30, 0]


def test_parallel_proposals_differ():
    history = TrialHistory()
    study = add_cell(history, CELLS[0])
    running = [study.ask(SPACE) for _ in range(5)]
    points = np.array(
        [(np.log(t.params[LEARNING_RATE]), t.params[LOG2_BATCH] * np.log(2)) for t in running]
    )
    apart = np.linalg.norm(points[:, None] - points, axis=-1)[np.triu_indices(5, 1)]
    assert apart.min() > 0.25
    assert len(history.pending(CELLS[0].name)) == 5
    assert len(history.pending(CELLS[0].name, besides=0)) == 4
    run(study, CELLS[0], 6)
    more = [study.ask(SPACE) for _ in range(3)]
    assert len({tuple(t.params.values()) for t in more}) == 3


def test_crashes_tell_nothing_and_divergence_lowers_the_rate():
    history = TrialHistory()
    study = add_cell(history, CELLS[0])
    first = study.ask(SPACE)
    first.set_user_attr("status", "crashed")
    study.tell(first, state=TrialState.FAIL)
    assert len(history.trials_of(CELLS[0].name).loss) == 0
    before = history.surface().optimum(CELLS[0])
    second = study.ask(SPACE)
    second.set_user_attr("status", "diverged")
    second.set_user_attr("ran_at", [before.learning_rate, 5.0])
    study.tell(second, state=TrialState.FAIL)
    assert history.trials_of(CELLS[0].name).diverged.tolist() == [True]
    after = history.surface().optimum(CELLS[0])
    assert after.learning_rate < 0.7 * before.learning_rate
    pruned = study.ask(SPACE)
    study.tell(pruned, state=TrialState.PRUNED)
    assert len(history.trials_of(CELLS[0].name).loss) == 1


def test_where_a_trial_ran_counts_not_where_it_was_asked_to():
    history = TrialHistory()
    study = add_cell(history, CELLS[0])
    trial = study.ask(SPACE)
    moved = [trial.params[LEARNING_RATE] * np.exp(0.2), trial.params[LOG2_BATCH] + 0.5]
    trial.set_user_attr("ran_at", moved)
    study.tell(trial, 3.0)
    known = history.trials_of(CELLS[0].name)
    assert known.learning_rate == pytest.approx([moved[0]])
    assert known.batch_tokens == pytest.approx([SEQUENCE * 2 ** moved[1]])
    assert history.granularity() == pytest.approx([0.2, 0.5 * np.log(2)])


def test_starts_by_the_published_law_and_says_so(caplog):
    history = TrialHistory()
    study = add_cell(history, CELLS[1])
    with caplog.at_level(logging.INFO, logger="raysweep"):
        first = study.ask(SPACE)
    assert "published laws" in caplog.text
    law = history.surface().optimum(CELLS[1])
    assert abs(np.log(first.params[LEARNING_RATE] / law.learning_rate)) < 1
    asked_batch = SEQUENCE * 2.0 ** first.params[LOG2_BATCH]
    assert abs(np.log(asked_batch / law.batch_tokens)) < 1.5


def test_works_under_study_optimize_with_other_parameters_beside():
    history = TrialHistory()
    study = add_cell(history, CELLS[0])

    def objective(trial: optuna.Trial) -> float:
        params = {
            LEARNING_RATE: trial.suggest_float(LEARNING_RATE, *RATES, log=True),
            LOG2_BATCH: trial.suggest_int(LOG2_BATCH, *BATCHES),
        }
        return true_loss(CELLS[0], params) + 0.001 * trial.suggest_float("other", 0, 1)

    study.optimize(objective, n_trials=10)
    lowest = 3.0
    assert study.best_value < lowest * 1.005


def test_survives_cloudpickle():
    history = TrialHistory()
    study = add_cell(history, CELLS[0])
    run(study, CELLS[0], 3)
    copied_history, copied = cloudpickle.loads(cloudpickle.dumps((history, study)))  # pyright: ignore
    assert copied.ask(SPACE).params == study.ask(SPACE).params
    assert len(copied_history.trials_of(CELLS[0].name).loss) == 3


def test_a_cell_known_with_other_sizes_is_a_user_error():
    history = TrialHistory()
    study = add_cell(history, CELLS[0])
    other = RunSize(name=CELLS[0].name, params_active_non_embedding=2e6, tokens=2e7)
    with pytest.raises(UserError, match="other sizes"):
        history.register(other, study, sequence_length=SEQUENCE)
    with pytest.raises(UserError, match="not registered"):
        history.trials_of("nowhere")


@pytest.mark.slow
def test_planted_exponents_lie_in_their_intervals_and_recommendations_near_the_optimum():
    # 4 studies of each of two valleys that are not of the model's family; noise 0.1 %, 4 trials.
    studies = [plant(seed, shape, sizes=(3, 3)) for shape in SHAPES for seed in range(4)]
    surfaces = [search(study)[0] for study in studies]
    held_all = [all(held(s, p.exponents)) for s, p in zip(surfaces, studies, strict=True)]
    assert sum(held_all) >= 7
    gaps = np.concatenate(list(map(recommended_gaps, studies, surfaces)))
    assert gaps.mean() < 0.04
    assert np.quantile(gaps, 0.9) < 0.1
