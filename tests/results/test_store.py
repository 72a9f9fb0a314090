"""The results store: atomic, deduplicated, readable by others, and honest about damage."""

import datetime as dt
import errno
import fcntl
import json
import math
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results import Results, lease
from raysweep.results.lock import study_lock
from raysweep.results.schema import COLUMNS


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "r", create=True)


def test_rows_and_curves_come_back(results: Results, a_row, curve) -> None:
    results.write(a_row("k1", loss=2.5), curve)
    frame = Results.open(results.uri).to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["loss"].tolist() == [2.5]
    assert results.curves(["k1"])["train_loss"].tolist() == [4.0, 3.0]
    found = results.find("k1", "s")
    assert found is not None
    assert found["loss"] == 2.5
    assert results.find("k2", "s") is None


def test_pandas_and_duckdb_read_the_folder_as_it_is(results: Results, a_row) -> None:
    for i in range(3):
        results.write(a_row(f"k{i}", loss=float(i)))
    folder = Path(results.uri) / "trials"
    assert sorted(pd.read_parquet(folder)["loss"]) == [0, 1, 2]
    query = f"select sum(loss), count(*) from '{folder}/*.parquet'"
    assert duckdb.connect().execute(query).fetchall() == [(3.0, 3)]


def test_losses_on_named_sets_are_columns(results: Results, a_row) -> None:
    results.write(a_row("a", named_losses=json.dumps({"code": [2.0, 0.1], "books": [3.0, 0.2]})))
    results.write(a_row("b"))
    of = results.to_pandas().set_index("trial_key").to_dict("index")
    assert [of["a"][n] for n in ("loss.code", "loss_se.code", "loss.books")] == [2.0, 0.1, 3.0]
    assert all(math.isnan(of["b"][n]) for n in ("loss.code", "loss_se.books"))


def test_a_retried_trial_counts_once_and_its_finished_row_wins(results: Results, a_row) -> None:
    results.write(a_row("k", status="crashed", loss=None))
    results.write(a_row("k", loss=2.0))
    assert results.to_pandas()[["status", "loss"]].to_numpy().tolist() == [["finished", 2.0]]
    late_crash = a_row("k", status="crashed", loss=None, started_at=dt.datetime.now(dt.UTC))
    results.compact(above=0)
    results.write(late_crash)
    assert results.to_pandas()["status"].tolist() == ["finished"]


def test_studies_that_run_the_same_trial_have_a_row_each(results: Results, a_row, curve) -> None:
    results.write(a_row("k", study="A", loss=2.0), curve)
    older = Path(results.uri) / "trials" / "k.A.parquet"
    older.rename(older.with_name("k.parquet"))  # as it was named once
    assert results.find("k", "B") is None
    results.write(a_row("k", study="B", loss=None, status="diverged"), curve)
    found = results.find("k", "B")
    assert found is not None
    assert found["status"] == "diverged"
    for above in (10, 0):
        results.compact(above=above)
        assert sorted(results.to_pandas()["study"]) == ["A", "B"]
        assert results.to_pandas("A")["loss"].tolist() == [2.0]
        assert results.to_pandas("B")["status"].tolist() == ["diverged"]
    assert len(results.curves(["k"])) == 2


def test_compaction_keeps_every_row_and_bounds_the_files(results: Results, a_row, curve) -> None:
    for i in range(20):
        results.write(a_row(f"k{i}"), curve)
    before, curves = results.to_pandas(), results.curves()
    results.compact(above=10)
    pd.testing.assert_frame_equal(results.to_pandas(), before)
    pd.testing.assert_frame_equal(results.curves(), curves)
    assert len(list((Path(results.uri) / "trials").iterdir())) == 1


def test_compaction_cut_off_before_the_deletes_counts_no_row_twice(results: Results, a_row) -> None:
    for i in range(5):
        results.write(a_row(f"k{i}"))
    singles = {p.name: p.read_bytes() for p in (Path(results.uri) / "trials").iterdir()}
    results.compact(above=0)
    for name, content in singles.items():
        (Path(results.uri) / "trials" / name).write_bytes(content)
    assert sorted(results.to_pandas()["trial_key"]) == [f"k{i}" for i in range(5)]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_file_is_named_and_costs_only_its_own_rows(
    results: Results, damage, a_row
) -> None:
    results.write(a_row("good"))
    results.write(a_row("bad"))
    path = Path(results.uri) / "trials" / "bad.s.parquet"
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert results.to_pandas()["trial_key"].tolist() == ["good"]
    (problem,) = results.problems
    assert "trials/bad.s.parquet is unreadable" in problem
    results.compact(above=0)
    assert path.exists()
    assert results.to_pandas()["trial_key"].tolist() == ["good"]


def test_hidden_partial_files_are_not_read(results: Results, a_row) -> None:
    results.write(a_row("k"))
    (Path(results.uri) / "trials" / ".k2.parquet.abcd").write_bytes(b"half")
    assert len(results.to_pandas()) == 1
    assert not results.problems


def test_imports_add_only_what_is_new(results: Results, a_row) -> None:
    rows = pd.DataFrame([a_row("a"), a_row("b")])
    assert results.write_many(rows) == 2
    more = pd.DataFrame([a_row("b"), a_row("c"), a_row("c")])
    assert results.write_many(more) == 1
    assert sorted(results.to_pandas()["trial_key"]) == ["a", "b", "c"]


def test_search_spaces_and_runs_are_kept(results: Results) -> None:
    results.save_search_space("s", "study: s\n")
    results.save_run({"started_at": "2026-01-02T03:04:05+00:00", "trials": 3})
    assert results.search_spaces() == {"s": "study: s\n"}
    assert [r["trials"] for r in results.runs()] == [3]


def test_many_writers_may_make_one_folder_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def make(path: Path) -> str:
        barrier.wait()
        return Results.open(path, create=True).uri

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(10):
            path = tmp_path / str(attempt)
            assert set(pool.map(make, [path] * 8)) == {str(path)}


def test_opening_what_is_not_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Results.open(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(UserError, match="holds no raysweep results"):
        Results.open(tmp_path / "other")
    with pytest.raises(UserError, match="is not empty"):
        Results.open(tmp_path / "other", create=True)
    with pytest.raises(UserError, match="is a file"):
        Results.open(tmp_path / "other" / "file")
    with pytest.raises(UserError, match="no filesystem for this URI"):
        Results.open("nope://bucket/x")


@pytest.mark.parametrize(
    ("marker", "expected"),
    [("{", "is damaged"), (json.dumps({"schema_version": 999}), "newer raysweep")],
)
def test_bad_markers(tmp_path: Path, marker: str, expected: str) -> None:
    (tmp_path / "raysweep.json").write_text(marker)
    with pytest.raises(UserError, match=expected):
        Results.open(tmp_path)


def _hold(uri: str, ready, done) -> None:
    with study_lock(Results.open(uri).storage):
        ready.set()
        done.wait(30)


def test_a_second_driver_is_refused_and_a_dead_one_holds_nothing(results: Results) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(results.uri, ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="in use by process"), study_lock(results.storage):
        pass
    holder.kill()
    holder.join()
    with study_lock(results.storage):
        pass


@pytest.mark.parametrize("why", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_a_lease_holds_the_folder(
    results: Results, why: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such file system can be had here: its answer is put in the kernel's place."""

    def refused(*_: object) -> None:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    held = Path(results.uri) / lease.LEASE
    with study_lock(results.storage):
        assert held.exists()
        with (
            pytest.raises(UserError, match=r"in use by process .*lease"),
            study_lock(results.storage),
        ):
            pass
    assert not held.exists()


def test_a_lock_that_fails_otherwise_says_why(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    why = r"cannot lock .*: Input/output error"
    with pytest.raises(UserError, match=why), study_lock(results.storage):
        pass


def test_checkpoints_stay_of_trials_that_go_on_and_no_others(results: Results, a_row) -> None:
    results.write(a_row("over"))
    results.write(a_row("again", status="crashed", loss=None))
    results.save_running("s", {"trials": [{"trial_key": "running"}]})
    results.save_running("other", {"trials": [{"trial_key": "elsewhere"}, "junk"]})
    for key in ("over", "again", "running", "elsewhere", "unknown"):
        results.storage.write(b"state", "checkpoints", key, "checkpoint.pt")
    results.drop_checkpoints()
    assert sorted(results.storage.folders("checkpoints")) == ["again", "elsewhere", "running"]
