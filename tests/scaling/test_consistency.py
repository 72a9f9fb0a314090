"""Python, the command line, `fit --json`, comparisons and the search answer alike from one fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import raysweep
from raysweep.cli import app
from raysweep.results import Results
from raysweep.scaling.compare import MAX_RUNS, compare_arms, needed, shared_sizes
from raysweep.scaling.fits import Fits
from raysweep.search.history import TrialHistory
from raysweep.search.value import targets_of
from raysweep.study import Study
from raysweep.study.shape import RunSize

Make = Callable[..., pd.DataFrame]


def _stored(frame: pd.DataFrame, folder: Path) -> str:
    rows = frame.assign(
        trial_key=[f"k{i}" for i in range(len(frame))],
        schema_version=1,
        source="raysweep",
        started_at=pd.Timestamp("2026-01-01", tz="UTC"),
    )
    uri = str(folder / "results")
    Results.open(uri, create=True).write_many(rows)
    return uri


def _dense(make: Make, folder: Path) -> str:
    return _stored(make(per_cell=10), folder)


def _moe(make: Make, folder: Path) -> str:
    return _stored(make(kinds=("dense", "moe"), per_cell=10, moe_rate=0.8), folder)


def _several(make: Make, folder: Path) -> str:
    """Two dense architectures of which one learns at twice the rate, and a MoE."""
    frame = make(kinds=("dense", "moe"), per_cell=10)
    fast = frame[frame["architecture"] == "dense"].copy()
    fast = fast.assign(
        architecture="fast",
        cell="fast-" + fast["cell"],
        learning_rate=2 * fast["learning_rate"],
        d_model=7,
    )
    return _stored(pd.concat([frame, fast], ignore_index=True), folder)


def _few(make: Make, folder: Path) -> str:
    return _stored(make(scales=(1e7, 3e7, 9e7), tokens_per_param=(20,), per_cell=6), folder)


def _imported(make: Make, folder: Path) -> str:
    frame = make(per_cell=10)[
        ["params_active_non_embedding", "tokens", "learning_rate", "batch_tokens", "loss"]
    ]
    frame.columns = ["N", "D", "lr", "bs", "val"]
    frame.to_csv(folder / "mine.csv", index=False)
    columns = {
        "params_active_non_embedding": "N",
        "tokens": "D",
        "learning_rate": "lr",
        "batch_tokens": "bs",
        "loss": "val",
    }
    uri = str(folder / "results")
    raysweep.import_results(folder / "mine.csv", uri, columns=columns)
    return uri


CASES = {
    "dense": _dense,
    "moe": _moe,
    "several": _several,
    "few": _few,
    "imported": _imported,
}

SIZES = ((9e7, 1.8e9), (5e7, 1e9), (1e9, 2e10), (2e8, 8e10))
"""(N, D): of a cell or near one, among the cells, beyond them, and off their path."""


@dataclass(frozen=True)
class Case:
    uri: str
    fits: Fits


@pytest.fixture(scope="module", params=list(CASES))
def case(
    request: pytest.FixtureRequest, planted_study: Make, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    uri = CASES[request.param](planted_study, tmp_path_factory.mktemp(request.param))
    return Case(uri, raysweep.fit(uri))


def asked(*words: str) -> dict | list:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(("params", "tokens"), SIZES[::2])
def test_python_and_the_command_line_say_the_same(case: Case, params: float, tokens: float) -> None:
    answers = {a: case.fits.recommend(a, params, tokens) for a in case.fits.architectures}
    told = asked("recommend", case.uri, "--params", f"{params:g}", "--tokens", f"{tokens:g}")
    told = told if isinstance(told, list) else [told]
    assert [t["architecture"] for t in told] == list(answers)
    for plain, answer in zip(told, answers.values(), strict=True):
        assert plain == answer.to_dict()
        assert plain["learning_rate"] == answer.learning_rate
        assert plain["verdict"] in str(answer)


def test_an_array_is_its_single_answers(case: Case) -> None:
    params, tokens = zip(*SIZES, strict=True)
    for name in case.fits.architectures:
        table = case.fits.recommend(name, params, tokens)
        for row, size in zip(table.to_dict("records"), SIZES, strict=True):
            one = case.fits.recommend(name, *size)
            for key in ("learning_rate", "batch_tokens", "loss", "largest_batch"):
                assert row[key] == pytest.approx(getattr(one, key), rel=1e-9, nan_ok=True)
            ends = row["loss_low"], row["loss_high"]
            assert ends == pytest.approx(one.loss_interval, nan_ok=True)


def test_the_loss_at_the_recommended_point_is_the_recommended_loss(case: Case) -> None:
    for name in case.fits.architectures:
        for size in SIZES:
            answer = case.fits.recommend(name, *size)
            at = answer.learning_rate, answer.batch_tokens_exact
            found = case.fits.predict(*at, *size, architecture=name).iloc[0]
            # What is not known of the optimum costs: in the middle, a part of its own interval.
            assert 0 <= found["cost"] < 0.02
            if math.isnan(answer.loss):
                assert math.isnan(found["loss"])
                continue
            assert found["loss"] == pytest.approx(answer.loss * (1 + found["cost"]), rel=1e-9)
            assert found["low"] <= answer.loss <= found["high"]


@pytest.mark.slow
def test_fit_prints_the_laws_that_answer(case: Case) -> None:
    told = asked("fit", case.uri)
    assert isinstance(told, dict)
    (laws,) = told["laws"].values()
    cells = {row["cell"]: row for row in told["cells"]}
    for name in case.fits.architectures:
        for size in SIZES:
            answer = case.fits.recommend(name, *size)
            if answer.run.name in cells:
                continue
            rate, batch = (_law(laws, answer.run, target) for target in laws["terms"])
            assert answer.learning_rate == pytest.approx(rate, rel=6e-3)  # three digits
            assert answer.batch_tokens_exact == pytest.approx(batch, rel=1e-6)
    for row in (row for row in cells.values() if row["status"] == "interior"):
        size = row["params_active_non_embedding"], row["tokens"]
        answer = case.fits.recommend(row["architecture"], *size)
        assert answer.run.name == row["cell"]
        assert row["learning_rate"] == pytest.approx(answer.learning_rate, rel=6e-3)
        assert row["batch_tokens"] == pytest.approx(answer.batch_tokens_exact, rel=1e-6)
        assert row["loss"] == pytest.approx(answer.loss, rel=1e-9)


def _law(laws: dict, run: RunSize, target: str) -> float:
    """A law of `fit --json` at a run, term by term."""
    n = math.log(run.params_active_non_embedding / laws["centre"]["params"])
    d = math.log(run.tokens / laws["centre"]["tokens"])
    reads = {
        "at_centre": 1.0,
        "params": n,
        "tokens": d,
        "sparsity": run.log_sparsity,
        "params params": n * n / 2,
        "params tokens": n * d,
        "tokens tokens": d * d / 2,
        f"routing e{run.experts}k{run.top_k}": 1.0,
        f"group {run.group}": 1.0,
    }
    return math.exp(sum(v * reads.get(k, 0.0) for k, v in laws["terms"][target].items()))


@pytest.mark.slow
def test_ratios_are_those_of_the_recommendations(case: Case) -> None:
    first, *others = (case.fits.arm(name) for name in case.fits.architectures)
    for other in others:
        sizes, paired = shared_sizes(first, other)
        assert paired == len(sizes) == min(8, MAX_RUNS)
        ratios = compare_arms(first, other)
        for quantity in ("learning_rate", "batch_tokens_exact", "loss"):
            logs = [
                math.log(
                    getattr(case.fits.recommend(other.architecture, *size), quantity)
                    / getattr(case.fits.recommend(first.architecture, *size), quantity)
                )
                for size in sizes
            ]
            found = needed(ratios, quantity.removesuffix("_exact"), "N and D")
            assert found.value == pytest.approx(math.exp(np.mean(logs)), rel=2e-3)
            assert found.low < found.value < found.high


SPACE = """\
study: planted
architectures: {dense: {}, moe: {experts: 8, top_k: 2}}
model: {sequence_length: 32}
scales:
  - {name: a, d_model: 16, layers: 1, heads: 2}
  - {name: b, d_model: 32, layers: 2, heads: 2}
  - {name: c, d_model: 64, layers: 3, heads: 2}
horizons: [{tokens_per_param: 10}, {tokens_per_param: 40}]
targets: [{architecture: dense, params: 1e6, tokens: 1e8}]
"""


@pytest.mark.parametrize("trust", ["", "literature: [deepseek, step_law]\n", "without: [kaplan]\n"])
def test_the_search_aims_at_what_the_fit_recommends(tmp_path: Path, trust: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE + trust)
    study = Study.load(path)
    rng = np.random.default_rng(0)
    from raysweep.scaling.optima.literature import literature_prior

    ladder = TrialHistory(literature_prior(study.space.without, study.space.literature))
    rows = []
    for cell in study.cells:
        size = cell.size
        rate = (
            1e-2 * (size.params_active_non_embedding / 1e4) ** -0.3 * np.exp(rng.uniform(-1, 1, 8))
        )
        batch = 32.0 * np.array([4, 8, 16, 32, 8, 16, 4, 8])
        loss = 3 + 0.02 * np.log(rate / 1e-2) ** 2 + 0.02 * np.log(batch / 300) ** 2
        ladder.add_imported(size, rate, batch, loss)
        for k in range(8):
            rows.append(
                {
                    "trial_key": f"{cell.name}{k}",
                    "schema_version": 1,
                    "started_at": pd.Timestamp("2026-01-01", tz="UTC"),
                    "study": study.name,
                    "cell": cell.name,
                    "architecture": cell.architecture,
                    "architecture_kind": cell.settings.kind,
                    "scale": cell.scale,
                    "source": "raysweep",
                    "experts": size.experts,
                    "top_k": size.top_k,
                    "params_active_non_embedding": size.params_active_non_embedding,
                    "params_total_non_embedding": size.params_total_non_embedding,
                    "tokens": size.tokens,
                    "learning_rate": rate[k],
                    "batch_tokens": batch[k],
                    "loss": loss[k],
                    "status": "finished",
                }
            )
    results = Results.open(tmp_path / "results", create=True)
    results.write_many(pd.DataFrame(rows))
    results.save_search_space(study.name, path.read_text())
    fits = raysweep.fit(results)
    surface = ladder.surface()
    (target,) = targets_of(study)
    answer = fits.recommend("dense", target.params_active_non_embedding, target.tokens)
    rate, batch = surface.optimum(target).estimates()
    assert answer.learning_rate == pytest.approx(rate.value, rel=6e-3)
    assert answer.batch_tokens_exact == pytest.approx(batch.value, rel=1e-4)
    assert answer.learning_rate_interval == pytest.approx((rate.low, rate.high), rel=1e-3)
    assert set(fits.prior.laws) == set(ladder.prior.laws)  # type: ignore[union-attr]
