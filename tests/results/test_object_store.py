"""The store on a real S3 server: all it does, also where one request in five fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.object_store import ObjectStore
from raysweep.errors import StorageError, UserError
from raysweep.results import Results, lease
from raysweep.results.filesystem import Storage, patient, retry
from raysweep.results.lock import study_lock

REPO = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from raysweep.results import lease
from raysweep.results.filesystem import Storage
from raysweep.errors import UserError
lease.RENEW_SECONDS, lease.SETTLE_SECONDS, lease.LAPSE_SECONDS = 0.2, 0.2, 1.5
try:
    with lease.lease(Storage.at(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
except UserError as error:
    print(error, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LAPSE_SECONDS", 1.5)


def hold(uri: str) -> subprocess.Popen[str]:
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri], stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    return driver


def said(driver: subprocess.Popen[str]) -> str:
    assert driver.stdout is not None
    return driver.stdout.readline().strip()


def use_all(uri: str, a_row: Callable, curve: dict) -> Results:
    """Everything that a study does to its results."""
    results = Results.open(uri, create=True)
    for i in range(8):
        results.write(a_row(f"k{i}", loss=float(i)), curve)
    results.write(a_row("k3", loss=0.5), curve)  # a retry
    assert results.write_many(pd.DataFrame([a_row("k1"), a_row("m1"), a_row("m2")])) == 2
    results.save_search_space("s", "study: s\n")
    for second in range(12):
        results.save_run({"started_at": f"2026-01-02T03:04:{second:02d}+00:00", "study": "s"})
    results.compact(above=6)
    results.write(a_row("late"), curve)
    return results


def check_all(uri: str) -> None:
    results = Results.open(uri)
    frame = results.to_pandas()
    assert sorted(frame["trial_key"]) == sorted([*(f"k{i}" for i in range(8)), "m1", "m2", "late"])
    assert frame.set_index("trial_key").loc["k3", "loss"] == 0.5
    assert len(results.curves()) == 2 * 9
    found = results.find("late", "s")
    assert found is not None
    assert found["loss"] == 3.0
    assert results.find("none", "s") is None
    assert results.search_spaces() == {"s": "study: s\n"}
    assert len(results.runs()) == 12
    assert not results.problems
    assert len(results.storage.list("trials")) == 2
    assert len(results.storage.list("runs")) == 1


@pytest.mark.slow
def test_everything_works_in_an_object_store(bucket: str, a_row, curve) -> None:
    use_all(bucket, a_row, curve)
    check_all(bucket)
    with pytest.raises(UserError, match="does not exist"):
        Results.open(bucket.replace("?", "-none?"))


@pytest.mark.slow
def test_one_request_in_five_fails_and_nothing_is_lost_or_doubled(
    bucket: str, store: ObjectStore, a_row, curve
) -> None:
    store.share, store.requests, store.failed = 0.2, 0, 0
    use_all(bucket, a_row, curve)
    check_all(bucket)
    assert store.failed / store.requests > 0.1


@pytest.mark.slow
def test_a_store_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysweep.results.filesystem.ATTEMPTS", 1)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"cannot read raysweep\.json in s3://bucket/x"):
        Results.open("s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:1")
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("calls", [5, 20])
def test_a_study_waits_longer_for_a_store_that_fails(
    monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr("raysweep.results.filesystem.time.sleep", lambda seconds: None)
    left = [calls]

    def fails() -> str:
        left[0] -= 1
        if left[0] > 0:
            raise OSError("try again")
        return "done"

    if calls > 6:
        with pytest.raises(StorageError, match="cannot look: try again"):
            retry(fails, "look")
    with patient():
        assert retry(fails, "look") == "done"


@pytest.mark.slow
def test_two_drivers_of_one_study(bucket: str, quick: None) -> None:
    first = hold(bucket)
    try:
        assert said(first) == "held"
        with (
            pytest.raises(UserError, match=rf"in use by process {first.pid} on .*lease ends"),
            study_lock(Storage.at(bucket)),
        ):
            pass
        first.kill()  # its lease lapses, whatever the clocks of the two say
        begun = time.monotonic()
        with study_lock(Storage.at(bucket)):
            assert 1 < time.monotonic() - begun < 10
        begun = time.monotonic()
        with study_lock(Storage.at(bucket)):  # one that was given back costs no waiting
            assert time.monotonic() - begun < 1.5
    finally:
        first.kill()
        first.wait()


@pytest.mark.slow
def test_of_two_that_start_at_once_one_runs(bucket: str) -> None:
    drivers = [hold(bucket), hold(bucket)]
    try:
        lines = sorted(map(said, drivers))
        assert lines[0] == "held"
        assert "in use by process" in lines[1]
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()


@pytest.mark.slow
def test_a_holder_that_slept_through_its_lapse_gives_way(bucket: str, quick: None) -> None:
    first = hold(bucket)
    try:
        assert said(first) == "held"
        os.kill(first.pid, signal.SIGSTOP)
        with study_lock(Storage.at(bucket)):
            os.kill(first.pid, signal.SIGCONT)
            assert first.wait(20) == -signal.SIGTERM  # `run` turns it into a good ending
            time.sleep(0.5)
    finally:
        first.kill()
        first.wait()


def test_a_run_whose_lease_was_taken_over_says_by_whom(bucket: str, quick: None) -> None:
    def interrupted(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    storage = Storage.at(bucket)

    def run() -> None:
        with lease.lease(storage):
            storage.write(b'{"holder": "process 1 on other", "nonce": "x"}', lease.LEASE)
            time.sleep(20)

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        with pytest.raises(UserError, match="was taken over by process 1 on other"):
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert storage.read(lease.LEASE) is not None, "the other's lease stands"
