"""The course of a study, simulated: budgets, order, workers kept busy, resuming, edges, repeats."""

import heapq
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results.schema import COLUMNS
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import Proposal, StudyScheduler, bundles_of
from raysweep.study import Study

BASE = {
    "study": "sim",
    "model": {"sequence_length": 64},
    "scales": [
        {"name": "xs", "d_model": 16, "layers": 2, "heads": 2},
        {"name": "s", "d_model": 32, "layers": 2, "heads": 2},
        {"name": "m", "d_model": 64, "layers": 2, "heads": 4},
    ],
    "horizons": [{"tokens_per_param": 20}],
    "search": {
        "trials_per_cell": 4,
        "learning_rate": {"low": 1e-4, "high": 1e-1},
        "batch_sequences": {"low": 4, "high": 256},
    },
}


QUICK = {"strategy": "qmc"}
"""Of tests in which it does not matter where in a cell a trial is: the ladder fits at every one."""


def make_study(**search) -> Study:
    return Study.from_dict({**BASE, "search": {**BASE["search"], **search}})


def planted(proposal: Proposal, optimum: float = 1e-2) -> tuple[str, float | None]:
    """A valley in learning rate and batch; divergence at very high learning rates."""
    u = math.log(proposal.spec.learning_rate / optimum)
    v = math.log(proposal.spec.batch_sequences / 32)
    if u > 3.5:
        return "diverged", None
    scale = proposal.spec.cell.counts.params_active_non_embedding
    return "finished", 2.0 + 10 * scale**-0.3 + 0.03 * u**2 + 0.01 * v**2


def simulate(
    scheduler: StudyScheduler, outcome=planted, *, stop_after: int | None = None, rng=None
):
    """Workers of the pool's size with random trial lengths. Yields (proposal, status, loss)."""
    rng = rng or np.random.default_rng(0)
    clock, events, ids = 0.0, [], itertools.count()
    log: list[tuple[Proposal, str, float | None]] = []
    scheduler.clock = lambda: clock
    while not scheduler.done:
        while True:
            proposal = scheduler.ask(f"t{next(ids)}")
            if proposal is None:
                break
            length = rng.exponential() * proposal.spec.cell.flops
            heapq.heappush(events, (clock + length, proposal.id, proposal))
        for left in scheduler.pool.free.values():
            assert all(amount >= -1e-9 for amount in left.values()), "over-subscribed"
        waiting = [bundles_of(s.cell) for s in scheduler.states.values() if scheduler.runnable(s)]
        fitting = [bundles for bundles in waiting if scheduler.pool.fits(bundles)]
        kept = any(len(bundles) > 1 for bundles in waiting if bundles not in fitting)
        assert kept or not fitting, "a worker idles, and not because a group waits for it"
        assert events, "neither running nor done"
        clock, trial_id, proposal = heapq.heappop(events)
        status, loss = outcome(proposal)
        scheduler.tell(trial_id, status, loss)
        log.append((proposal, status, loss))
        if stop_after is not None and len(log) >= stop_after:
            break
    return log


def rows_of(log) -> pd.DataFrame:
    """What the results folder would hold."""
    rows = []
    for proposal, status, loss in log:
        row = dict.fromkeys(COLUMNS)
        spec = proposal.spec
        row |= {
            "study": spec.study,
            "cell": spec.cell.name,
            "trial_key": spec.key,
            "learning_rate": spec.learning_rate,
            "batch_sequences": spec.batch_sequences,
            "seed": spec.seed,
            "status": status,
            "loss": loss,
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def two_workers() -> ResourcePool:
    return ResourcePool({"n": {"CPU": 2.0}})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ladder", "tpe", "qmc", "grid", "random", "cmaes"])
def test_every_strategy_gives_each_cell_its_trials(strategy: str) -> None:
    search = {**BASE["search"], "strategy": strategy, "extend_edges": False}
    both = {"dense": {}, "moe": {"experts": 8, "top_k": 2}}
    study = Study.from_dict({**BASE, "architectures": both, "search": search})
    assert len(study.cells) == 6
    log = simulate(StudyScheduler(study, "data", two_workers()))
    finished = pd.Series([p.spec.cell.name for p, status, _ in log if status == "finished"])
    assert (finished.value_counts() >= 4).all()
    assert finished.nunique() == len(study.cells)
    assert len({p.spec.key for p, *_ in log}) == len(log), "a trial was given out twice"


def test_small_cells_go_first() -> None:
    study = make_study(**QUICK)
    log = simulate(StudyScheduler(study, "data", ResourcePool({"n": {"CPU": 1.0}})))
    order = [p.spec.cell.flops for p, *_ in log]
    assert order == sorted(order)


def test_workers_of_different_size_are_never_idle_nor_overbooked() -> None:
    scales = [dict(s) for s in BASE["scales"]]
    scales[1]["resources"] = {"gpus_per_worker": 1}
    scales[2]["resources"] = {"gpus_per_worker": 1, "workers": 2}
    study = Study.from_dict({**BASE, "scales": scales, "search": BASE["search"] | QUICK})
    nodes = {
        "cpu": {"CPU": 1.0},
        "small": {"CPU": 2.0, "GPU": 1.0},
        "large": {"CPU": 4.0, "GPU": 2.0},
    }
    for seed in range(3):
        scheduler = StudyScheduler(study, "data", ResourcePool(nodes))
        log = simulate(scheduler, rng=np.random.default_rng(seed))
        assert len(log) >= 4 * len(study.cells)
        for group in scheduler.pool.waiting_groups:
            scheduler.pool.give_back(group)
        assert scheduler.pool.free == nodes


def test_groups_of_workers_are_kept_for_their_kind_and_given_back_for_what_comes_before() -> None:
    scales = [dict(s) for s in BASE["scales"]]
    scales[1]["resources"] = {"workers": 2}
    study = Study.from_dict({**BASE, "scales": scales, "search": BASE["search"] | QUICK})
    scheduler = StudyScheduler(study, "data", two_workers())
    groups: dict[str, list[str]] = {}
    ask = scheduler.ask

    def noting(trial_id: str):
        proposal = ask(trial_id)
        if proposal and (group := scheduler.pool.group_of(trial_id)):
            groups.setdefault(group, []).append(proposal.spec.cell.scale)
        return proposal

    scheduler.ask = noting  # type: ignore[method-assign]
    log = simulate(scheduler)
    on_two = [p for p, *_ in log if p.spec.cell.scale == scales[1]["name"]]
    assert len(on_two) >= 4
    assert {s for of_group in groups.values() for s in of_group} == {scales[1]["name"]}
    assert sum(map(len, groups.values())) == len(on_two)
    assert len(groups) < len(on_two), "some trials found a group that waited"
    ended = scheduler.pool.take_ended()
    assert set(ended) | set(scheduler.pool.waiting_groups) == set(groups)


def test_a_cell_too_large_for_the_cluster_is_handed_out_last_for_it_to_grow() -> None:
    scales = [dict(s) for s in BASE["scales"]]
    scales[2]["resources"] = {"gpus_per_worker": 1, "workers": 2}
    study = Study.from_dict({**BASE, "scales": scales, "search": BASE["search"] | QUICK})
    log = simulate(StudyScheduler(study, "data", two_workers()))
    assert [p.spec.cell.scale for p, *_ in log][-1] == "m"


@pytest.mark.slow
@pytest.mark.parametrize(("stop_after", "strategy"), [(1, "qmc"), (5, "ladder"), (10, "qmc")])
def test_a_stopped_study_goes_on_without_losing_or_repeating(
    stop_after: int, strategy: str
) -> None:
    study = make_study(strategy=strategy)
    first = simulate(StudyScheduler(study, "data", two_workers()), stop_after=stop_after)
    second = simulate(StudyScheduler(study, "data", two_workers(), rows=rows_of(first)))
    keys = [p.spec.key for p, *_ in first + second]
    assert len(set(keys)) == len(keys)
    done = pd.Series([p.spec.cell.name for p, status, _ in first + second if status == "finished"])
    assert (done.value_counts() >= 4).all()
    assert StudyScheduler(study, "data", two_workers(), rows=rows_of(first + second)).done


def test_a_finished_study_can_be_given_more_trials_and_scales() -> None:
    settings = {**QUICK, "extend_edges": False}
    log = simulate(StudyScheduler(make_study(**settings), "data", two_workers()))
    more = make_study(**settings, trials_per_cell=6)
    added = simulate(StudyScheduler(more, "data", two_workers(), rows=rows_of(log)))
    assert len(added) == 2 * len(more.cells)


def test_rows_of_another_recipe_or_corpus_are_refused() -> None:
    log = simulate(StudyScheduler(make_study(**QUICK), "data", two_workers()), stop_after=3)
    with pytest.raises(UserError, match=r"another recipe, shape, seed or corpus"):
        StudyScheduler(make_study(**QUICK), "other data", two_workers(), rows=rows_of(log))


def test_crashes_do_not_use_up_the_budget_and_a_broken_cell_is_given_up() -> None:
    def outcome(proposal: Proposal):
        if proposal.spec.cell.name.startswith("dense-m"):
            return "crashed", None
        return planted(proposal)

    study = make_study(**QUICK, extend_edges=False)
    log = simulate(StudyScheduler(study, "data", two_workers()), outcome)
    cells = pd.Series([p.spec.cell.name for p, *_ in log]).value_counts()
    (broken,) = (c for c in cells.index if c.startswith("dense-m"))
    assert cells[broken] <= 4
    assert (cells.drop(broken) >= 4).all()


def test_a_cell_that_worked_and_now_always_crashes_is_given_up_too() -> None:
    started: list[str] = []

    def outcome(proposal: Proposal):
        started.append(proposal.spec.cell.name)
        worked = started.count(proposal.spec.cell.name) < 2
        return planted(proposal) if worked else ("crashed", None)

    study = make_study(**QUICK, extend_edges=False)
    log = simulate(StudyScheduler(study, "data", two_workers()), outcome)
    assert len(log) <= len(study.cells) * 13


def test_where_everything_diverges_a_cell_ends_all_the_same() -> None:
    log = simulate(
        StudyScheduler(make_study(), "data", two_workers()), lambda p: ("diverged", None)
    )
    assert 3 * 4 <= len(log) <= 3 * 8


@pytest.mark.slow
def test_an_optimum_beyond_the_range_widens_it_within_the_hard_limits() -> None:
    study = make_study(
        learning_rate={"low": 1e-4, "high": 1e-3, "hard_high": 5e-2}, trials_per_cell=6
    )
    scheduler = StudyScheduler(study, "data", two_workers())
    log = simulate(scheduler, lambda p: planted(p, optimum=8e-3))
    rates = [p.spec.learning_rate for p, *_ in log]
    assert max(rates) > 4e-3
    assert max(rates) <= 5e-2
    for state in scheduler.states.values():
        assert state.best is not None
        best = state.best.user_attrs.get("ran_at", (state.best.params["learning_rate"],))[0]
        assert best == pytest.approx(8e-3, rel=1.0)


EDGY = {"learning_rate": {"low": 1e-4, "high": 1e-3}, "trials_per_cell": 4}


def beyond(proposal: Proposal):
    return planted(proposal, optimum=8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [None, 3, 11, 17])
def test_a_study_that_widened_its_ranges_ends_once_wherever_it_was_stopped(stop_after) -> None:
    """The budgets are those of widened ranges, and nothing is left to do when it is run again."""
    study = make_study(**EDGY)
    scheduler = StudyScheduler(study, "data", two_workers())
    log = simulate(scheduler, beyond, stop_after=stop_after)
    if stop_after is not None:
        kept = json.loads(json.dumps(scheduler.widened))
        scheduler = StudyScheduler(study, "data", two_workers(), rows=rows_of(log), ranges=kept)
        log += simulate(scheduler, beyond)
    counts = pd.Series([p.spec.cell.name for p, *_ in log]).value_counts()
    extensions = {name: s.extensions for name, s in scheduler.states.items()}
    assert sum(extensions.values()) > 0
    running = 2 if stop_after else 0  # trials that the stop cut off had widened no range
    for name, count in counts.items():
        assert count <= 4 + 2 * extensions[str(name)] + running
    again = StudyScheduler(
        study, "data", two_workers(), rows=rows_of(log), ranges=scheduler.widened
    )
    assert again.done
    assert again.widened == scheduler.widened


@pytest.mark.slow
@pytest.mark.parametrize("extend", [True, False])
def test_a_range_that_was_narrowed_stays_narrow(extend: bool) -> None:
    wide = StudyScheduler(make_study(), "data", two_workers())
    log = simulate(wide)
    rates = [p.spec.learning_rate for p, *_ in log]
    assert max(rates) > 3e-2
    narrow = make_study(
        learning_rate={"low": 1e-3, "high": 3e-2}, trials_per_cell=6, extend_edges=extend
    )
    for _ in range(2):  # on the second run the file's ranges are those of the last run
        scheduler = StudyScheduler(
            narrow, "data", two_workers(), rows=rows_of(log), ranges=wide.widened
        )
        added = simulate(scheduler, stop_after=5)
        assert added
        assert all(1e-3 <= p.spec.learning_rate <= 3e-2 for p, *_ in added)
        log += added


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ladder", "qmc"])
def test_repeats_do_not_eat_the_budget_of_a_study_that_is_continued(strategy: str) -> None:
    settings = {"repeats_at_optimum": 2, "extend_edges": False, "strategy": strategy}
    log = simulate(StudyScheduler(make_study(**settings), "data", two_workers()))
    assert len(log) == 3 * (4 + 2)
    more = make_study(**settings, trials_per_cell=8)
    log += simulate(StudyScheduler(more, "data", two_workers(), rows=rows_of(log)))
    points = {(p.spec.cell.name, p.spec.learning_rate, p.spec.batch_sequences) for p, *_ in log}
    assert len(points) == 3 * 8
    assert StudyScheduler(more, "data", two_workers(), rows=rows_of(log)).done


def test_a_cell_that_diverges_ends_wherever_its_study_was_stopped() -> None:
    study = make_study(batch_sequences={"low": 16, "high": 32}, extend_edges=False)
    log = []
    for _ in range(40):
        scheduler = StudyScheduler(study, "data", two_workers(), rows=rows_of(log))
        if scheduler.done:
            break
        log += simulate(scheduler, lambda p: ("diverged", None), stop_after=1)
    assert len(log) == 3 * 8


def test_imported_results_teach_the_first_trial() -> None:
    # A sweep of someone else's whose optimum lies far from the published law.
    study = make_study()
    cell = study.cells[-1]
    rows = []
    for i, j in itertools.product(range(8), range(5)):
        rate, sequences = 1e-4 * 2.7**i, 4 * 4**j
        u, v = math.log(rate / 5e-4), math.log(sequences / 64)
        row = dict.fromkeys(COLUMNS) | {
            "source": "import:csv",
            "cell": "theirs",
            "status": "finished",
            "experts": cell.shape.experts,
            "top_k": cell.shape.top_k,
            "params_active_non_embedding": cell.counts.params_active_non_embedding * 0.7,
            "params_total_non_embedding": cell.counts.params_total_non_embedding * 0.7,
            "tokens": cell.tokens * 0.7,
            "learning_rate": rate,
            "batch_tokens": sequences * 64.0,
            "loss": 3.0 + 0.05 * u**2 + 0.02 * v**2,
        }
        rows.append(row)
    imported = pd.DataFrame(rows, columns=list(COLUMNS))
    one = Study.from_dict({**BASE, "scales": BASE["scales"][-1:]})
    first = {}
    for taught in (False, True):
        scheduler = StudyScheduler(one, "d", two_workers(), imported=imported if taught else None)
        proposals = [scheduler.ask(f"t{i}") for i in range(2)]
        first[taught] = [abs(math.log(p.spec.learning_rate / 5e-4)) for p in proposals if p]
    assert min(first[True]) < 1.0
    assert min(first[True]) < 0.5 * min(first[False])


def test_every_worker_gets_a_sequence() -> None:
    scales = [dict(s) for s in BASE["scales"]]
    scales[0]["resources"] = {"workers": 4}
    search = {**BASE["search"], "batch_sequences": {"low": 1, "high": 64}}
    study = Study.from_dict({**BASE, "scales": scales, "search": search | QUICK})
    log = simulate(StudyScheduler(study, "data", ResourcePool({"n": {"CPU": 4.0}})))
    batches = [p.spec.batch_sequences for p, *_ in log if p.spec.cell.scale == "xs"]
    assert min(batches) >= 4


@pytest.mark.slow
def test_repeats_rerun_the_best_point_with_other_seeds() -> None:
    log = simulate(StudyScheduler(make_study(repeats_at_optimum=2), "data", two_workers()))
    for _, trials in itertools.groupby(
        sorted(log, key=lambda t: t[0].spec.cell.name), key=lambda t: t[0].spec.cell.name
    ):
        listed = list(trials)
        repeats = [p.spec for p, *_ in listed if p.repeat]
        assert len(repeats) == 2
        assert len({(s.learning_rate, s.batch_sequences) for s in repeats}) == 1
        seeds = [
            p.spec.seed
            for p, *_ in listed
            if (p.spec.learning_rate, p.spec.batch_sequences)
            == (repeats[0].learning_rate, repeats[0].batch_sequences)
        ]
        assert len(set(seeds)) == len(seeds) >= 3


@pytest.mark.slow
def test_a_flop_budget_ends_the_study() -> None:
    study = make_study()
    everything = sum(4 * c.flops for c in study.cells)
    log = simulate(StudyScheduler(make_study(total_flops=everything / 3), "data", two_workers()))
    assert sum(p.spec.cell.flops for p, *_ in log) <= everything / 3


@pytest.mark.slow
def test_a_flop_budget_beyond_each_cells_trials_goes_where_it_teaches_most() -> None:
    study = make_study(extend_edges=False)
    least = sum(4 * c.flops for c in study.cells)
    limit = 1.6 * least
    study = make_study(total_flops=limit, extend_edges=False)
    log = simulate(StudyScheduler(study, "data", two_workers()))
    spent = sum(p.spec.cell.flops for p, *_ in log)
    cheapest = min(c.flops for c in study.cells)
    counts = pd.Series([p.spec.cell.name for p, *_ in log]).value_counts()
    assert (counts >= 4).all()
    assert (counts <= 16).all()
    assert len(log) > 4 * len(study.cells)
    assert spent <= limit
    assert limit - spent < cheapest or (counts == 16).any()


@pytest.mark.slow
def test_a_flop_budget_goes_on_after_a_stop_and_while_no_worker_is_there() -> None:
    study = make_study(extend_edges=False)
    limit = 1.6 * sum(4 * c.flops for c in study.cells)
    study = make_study(total_flops=limit, extend_edges=False)
    first = simulate(
        StudyScheduler(study, "data", two_workers()), stop_after=4 * len(study.cells) + 1
    )
    scheduler = StudyScheduler(study, "data", ResourcePool({}), rows=rows_of(first))
    assert not scheduler.done
    asked = scheduler.ask("waits")
    assert asked is not None
    assert scheduler.ask("another") is None
    scheduler.pool.update({"n": {"CPU": 2.0}})
    scheduler.tell("waits", *planted(asked))
    log = [*first, (asked, *planted(asked)), *simulate(scheduler)]
    spent = sum(p.spec.cell.flops for p, *_ in log)
    counts = pd.Series([p.spec.cell.name for p, *_ in log]).value_counts()
    left = [c for c in study.cells if counts[c.name] < 16]
    assert 0 <= limit - spent < min(c.flops for c in left)
    assert StudyScheduler(study, "data", ResourcePool({}), rows=rows_of(log)).done


@pytest.mark.slow
def test_same_seed_and_history_give_the_same_trials() -> None:
    logs = [simulate(StudyScheduler(make_study(), "data", two_workers())) for _ in range(2)]
    first, second = ([p.spec.key for p, *_ in log] for log in logs)
    assert first == second


@pytest.mark.slow
def test_a_shipped_study_proposes_inside_its_ranges(repo: Path) -> None:
    study = Study.load(
        repo / "search_spaces/laptop.yaml",
        ["search.extend_edges=false", "search.trials_per_cell=3"],
    )
    search = study.space.search
    for proposal, *_ in simulate(StudyScheduler(study, "data", two_workers())):
        assert search.learning_rate.low <= proposal.spec.learning_rate <= search.learning_rate.high
        assert proposal.spec.batch_sequences <= search.batch_sequences.high
        assert proposal.spec.steps >= 8


def test_nodes_are_kept_for_a_group_and_what_ends_before_it_starts_fills_them() -> None:
    scales = [BASE["scales"][0], {**BASE["scales"][2], "resources": {"workers": 4}}]
    search = {**BASE["search"], "trials_per_cell": 9}
    space = {**BASE, "scales": scales, "search": search}
    study = Study.from_dict(space)
    now = [0.0]
    pool = ResourcePool({"a": {"CPU": 2.0}, "b": {"CPU": 2.0}})
    scheduler = StudyScheduler(study, "data", pool, clock=lambda: now[0])
    small, large = study.cells
    scheduler.durations.add(small, 10.0)
    scheduler.durations.add(large, 1000.0)
    asked = [scheduler.ask(f"t{i}") for i in range(4)]
    assert [p and p.spec.cell for p in asked] == [small] * 4, "the fourth ends with the others"
    now[0] = 5.0
    scheduler.tell("t3", "finished", 3.0)
    assert pool.fits(bundles_of(small))
    assert scheduler.ask("late") is None, "it would end after them, and a group waits"
    scheduler.tell("t2", "finished", 3.0)
    assert scheduler.ask("next") is not None, "a third of each cell comes before the large one"
