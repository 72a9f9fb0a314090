"""Crashes, full disks and foreign files: rows are never lost or doubled, and files stay few."""

import contextlib
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep.errors import UserError
from raysweep.results import Results, filesystem
from raysweep.results.filesystem import Storage


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "r", create=True)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where thousands of files are written, waiting for the disk would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Crash(BaseException):
    """What a kill looks like from within: nothing may catch it and go on."""


class Mortal(Storage):
    """A storage whose process dies at its n-th change, before it or after it."""

    left = 0
    after = False

    def _live(self, change):
        type(self).left -= 1
        if self.left == 0 and not self.after:
            raise Crash
        change()
        if self.left == 0:
            raise Crash

    def write(self, data, *parts):
        self._live(lambda: Storage.write(self, data, *parts))

    def delete(self, *parts):
        self._live(lambda: Storage.delete(self, *parts))


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_compaction_killed_at_any_point(
    tmp_path: Path, quick_disk, after, a_row, curve, monkeypatch
) -> None:
    monkeypatch.setattr("raysweep.results.tables.PART_ROWS", 3)
    monkeypatch.setattr("raysweep.results.tables._THREADS", 1)
    Mortal.after = after
    results = Results.open(tmp_path / "whole", create=True)
    for i in range(4):
        results.write(a_row(f"k{i}", loss=float(i)), curve)
        results.save_run({"started_at": f"2026-01-02T03:04:0{i}", "study": "s"})
    before, curves, runs = results.to_pandas(), results.curves(), results.runs()
    ended, step = False, 0
    for step in range(1, 100):
        results = Results.open(shutil.copytree(tmp_path / "whole", tmp_path / str(step)))
        mortal = Mortal(results.storage.uri, results.storage.filesystem, results.storage.root)
        Mortal.left = step
        try:
            Results(mortal).compact(above=2)
            ended = True
        except Crash:
            ended = False
        for _ in range(2):
            pd.testing.assert_frame_equal(results.to_pandas(), before)
            pd.testing.assert_frame_equal(results.curves(), curves)
            assert results.runs() == runs
            results.compact(above=2)
        assert max(len(results.storage.list(f)) for f in ("trials", "curves", "runs")) <= 6
        if ended:
            break
    assert ended
    assert step > 12, "crashes were injected"


@pytest.mark.slow
def test_files_stay_few_over_a_long_study(results: Results, quick_disk, a_row, curve) -> None:
    most = 0
    for i in range(150):
        results.write(a_row(f"k{i}"), curve)
        results.save_run({"started_at": f"2026-01-02T03:{i:06d}", "study": "s"})
        if i % 5 == 0:  # a run that ends, and one that begins
            results.compact(above=10, kept=lambda now=i: {f"k{now}", f"k{now - 1}"})
        counts = [len(results.storage.list(f)) for f in ("trials", "curves", "runs")]
        most = max(most, *counts)
    assert most <= 10 + 2 + 5 + 11
    assert len(results.to_pandas()) == len(results.runs()) == 150
    assert len(results.curves()) == 300


def test_single_files_of_trials_that_may_be_retried_stay(results: Results, a_row) -> None:
    for i in range(10):
        results.write(a_row(f"k{i}"))
    results.compact(above=3, kept=lambda: {"k2", "k9"})
    assert results.find("k9", "s") is not None
    assert results.find("k0", "s") is None
    assert len(results.storage.list("trials")) == 3
    for i in range(10, 15):  # a merged file takes up the next ones while it is small
        results.write(a_row(f"k{i}"))
    results.compact(above=3)
    assert len(results.storage.list("trials")) == 1
    assert len(results.to_pandas()) == 15


def test_a_row_written_anew_while_its_old_one_is_merged_stays(results: Results, a_row) -> None:
    for i in range(4):
        results.write(a_row(f"k{i}", status="crashed", loss=None))

    class Late(Storage):
        def write(self, data, *parts):
            Storage.write(self, data, *parts)
            results.write(a_row("k2", loss=2.0))  # by a worker nobody waits for any more

    storage = results.storage
    Results(Late(storage.uri, storage.filesystem, storage.root)).compact(above=0)
    rows = results.to_pandas().set_index("trial_key")
    assert rows.loc["k2", "status"] == "finished"
    assert len(rows) == 4


def _read_all(uri: str, stop, reads, done) -> None:
    results, least = Results.open(uri), 10**9
    while not stop.is_set():
        least = min(least, len(results.to_pandas()))
        reads.value += 1
    done.put((least, results.problems))


@pytest.mark.slow
def test_a_reader_never_misses_rows_that_are_being_merged(
    results: Results, quick_disk, a_row
) -> None:
    context = multiprocessing.get_context("spawn")
    stop, reads, done = context.Event(), context.Value("i", 0), context.Queue()
    for i in range(20):
        results.write(a_row(f"k{i}"))
    reader = context.Process(target=_read_all, args=(results.uri, stop, reads, done))
    reader.start()
    while reads.value < 20 and reader.is_alive():
        results.compact(above=0)
        for i in range(10):
            results.write(a_row(f"k{i}"))
    stop.set()
    least, problems = done.get(timeout=60)
    reader.join()
    assert least == 20
    assert not problems


def test_foreign_and_older_files_in_the_folder(results: Results, a_row) -> None:
    results.write(a_row("k"))
    folder = Path(results.uri) / "trials"
    pq.write_table(pa.table({"x": [1, 2]}), folder / "foreign.parquet")
    (folder / "notes.txt").write_text("stray")
    (folder / "folder.parquet").mkdir()
    wrong = pq.read_table(folder / "k.s.parquet").set_column(
        0, "schema_version", pa.array([["not a number"]])
    )
    pq.write_table(wrong, folder / "wrong.parquet")
    older = pq.read_table(folder / "k.s.parquet").drop_columns(["router_confidence", "trial_key"])
    pq.write_table(older.append_column("trial_key", pa.array(["old"])), folder / "old.parquet")
    assert sorted(results.to_pandas()["trial_key"]) == ["k", "old"]
    assert sorted(p.split()[0] for p in results.problems) == [
        "trials/foreign.parquet",
        "trials/wrong.parquet",
    ]
    results.compact(above=0)
    assert sorted(results.to_pandas()["trial_key"]) == ["k", "old"]
    assert (folder / "foreign.parquet").exists()


def test_damaged_runs_and_search_spaces_are_named(results: Results) -> None:
    for folder, name in (("runs", "x.json"), ("studies", "x.yaml")):
        (Path(results.uri) / folder).mkdir()
        (Path(results.uri) / folder / name).write_bytes(b"\xff{")
    results.save_run({"started_at": "2026", "study": "s"})
    assert [r["study"] for r in results.runs()] == ["s"]
    assert results.search_spaces() == {}
    assert len(results.problems) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a quarter of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_row_and_goes_on_when_freed(small_disk: Path, a_row) -> None:
    results = Results.open(small_disk / "r", create=True)
    results.write(a_row("k", loss=1.0))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(UserError, match=r"cannot write trials/k\.s\.parquet .*no space left; free"):
        results.write(a_row("k", loss=2.0))
    assert results.to_pandas()["loss"].tolist() == [1.0]
    assert [p.name for p in (small_disk / "r" / "trials").iterdir()] == ["k.s.parquet"]
    ballast.unlink()
    results.write(a_row("k", loss=2.0))
    assert results.to_pandas()["loss"].tolist() == [2.0]


def test_a_full_disk_keeps_the_old_checkpoint(small_disk: Path) -> None:
    storage = Storage.at(small_disk)
    place = "checkpoints", "k", "checkpoint.pt"
    storage.write(b"old" * 1000, *place)
    with pytest.raises(UserError, match="no space left"):
        storage.write(b"new" * 100_000, *place)
    assert storage.read(*place) == b"old" * 1000
    left = [p.name for p in (small_disk / "checkpoints" / "k").iterdir()]
    assert left == ["checkpoint.pt"], "what was half written is gone"
    storage.write(b"new" * 10_000, *place)
    assert storage.read(*place) == b"new" * 10_000


def test_half_written_files_of_killed_writers_go_in_time(results: Results, a_row) -> None:
    results.write(a_row("k"))
    folder = Path(results.uri) / "trials"
    old, new = folder / ".a.parquet.0123abcd", folder / ".b.parquet.0123abcd"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    results.compact()
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("uri", ["memory://x", "nope://x"])
def test_uris_that_cannot_hold_results(uri: str) -> None:
    with pytest.raises(UserError, match="s3:// or gs://"):
        Storage.at(uri)


def test_a_file_uri_is_a_folder(tmp_path: Path, a_row) -> None:
    results = Results.open(f"file://{tmp_path}/with%20space", create=True)
    results.write(a_row("k"))
    assert results.uri == str(tmp_path / "with space")
    assert len(Results.open(tmp_path / "with space").to_pandas()) == 1


def test_lasting_faults_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def refuse() -> None:
        tries.append(1)
        raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")

    with pytest.raises(UserError, match="cannot read it"):
        filesystem.retry(refuse, "read it")
    assert len(tries) == 1
