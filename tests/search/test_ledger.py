"""The ledger: nothing is over-booked, bundles stay whole, nodes come and go."""

from hypothesis import given
from hypothesis import strategies as st

from raysweep.search.ledger import Ledger

CPU = {"CPU": 1.0}


def test_books_until_full_and_again_after_release() -> None:
    ledger = Ledger({"a": {"CPU": 2}})
    assert ledger.take("t1", [CPU])
    assert ledger.take("t2", [CPU])
    assert not ledger.fits([CPU])
    assert not ledger.take("t3", [CPU])
    ledger.release("t1")
    assert ledger.take("t3", [CPU])
    assert ledger.free == {"a": {"CPU": 0.0}}


def test_a_bundle_is_never_split_over_nodes() -> None:
    ledger = Ledger({"a": {"CPU": 1}, "b": {"CPU": 1}})
    assert not ledger.fits([{"CPU": 2}])
    assert ledger.fits([CPU, CPU])
    assert not ledger.could_ever_fit([{"CPU": 2}])


def test_small_bundles_fill_the_fullest_node_so_that_large_ones_still_fit() -> None:
    ledger = Ledger({"a": {"CPU": 4, "GPU": 4}, "b": {"CPU": 4, "GPU": 1}})
    assert ledger.take("small", [{"CPU": 1, "GPU": 1}])
    assert ledger.fits([{"CPU": 1, "GPU": 4}])


def test_fractions_of_a_gpu_add_up_to_one() -> None:
    ledger = Ledger({"a": {"CPU": 16, "GPU": 1}})
    for i in range(10):
        assert ledger.take(str(i), [{"CPU": 1, "GPU": 0.1}])
    assert not ledger.fits([{"CPU": 1, "GPU": 0.1}])


def test_a_forced_booking_waits_and_a_lost_node_frees_nothing_twice() -> None:
    ledger = Ledger({"a": {"CPU": 1}})
    assert ledger.take("big", [{"CPU": 8}], force=True)
    assert ledger.free == {"a": {"CPU": 1}}
    assert ledger.take("t", [CPU])
    ledger.update({"b": {"CPU": 1}})
    ledger.release("t")
    ledger.release("t")
    assert ledger.free == {"b": {"CPU": 1}}


def test_a_group_keeps_what_it_holds_for_the_next_trial_of_its_kind() -> None:
    ledger = Ledger({"a": {"CPU": 4}})
    assert ledger.take("t1", [CPU, CPU])
    group = ledger.group_of("t1")
    ledger.release("t1")
    assert ledger.free == {"a": {"CPU": 2.0}}
    assert ledger.waiting_groups == {group: [CPU, CPU]}
    assert ledger.take("t2", [CPU, CPU])
    assert ledger.group_of("t2") == group
    assert ledger.free == {"a": {"CPU": 2.0}}
    assert ledger.take("t3", [CPU, CPU])
    assert ledger.group_of("t3") != group
    ledger.release("t2")
    assert not ledger.fits([CPU])
    assert group is not None
    ledger.give_back(group)
    assert ledger.fits([CPU, CPU])
    assert ledger.take_ended() == [group]
    assert ledger.take_ended() == []


def test_a_group_that_has_lost_a_node_is_given_up() -> None:
    ledger = Ledger({"a": {"CPU": 1}, "b": {"CPU": 1}})
    for trial in ("running", "waiting"):
        assert ledger.take(trial, [CPU, CPU])
        group = ledger.group_of(trial)
        if trial == "waiting":
            ledger.release(trial)
        ledger.update({"a": {"CPU": 1}})
        ledger.release(trial)
        assert ledger.take_ended() == [group]
        assert ledger.free == {"a": {"CPU": 1}}
        ledger.update({"a": {"CPU": 1}, "b": {"CPU": 1}})


def test_workers_of_a_trial_stay_on_one_node_if_any_could_hold_them() -> None:
    ledger = Ledger({"a": {"CPU": 2}, "b": {"CPU": 2}})
    assert ledger.on_one_node([CPU, CPU])
    assert not ledger.on_one_node([CPU] * 3)
    assert ledger.fits([CPU] * 3)
    for trial in ("t1", "t2"):
        assert ledger.take(trial, [CPU])
    ledger.release("t1")
    assert ledger.take("t1", [CPU])
    assert sorted(left["CPU"] for left in ledger.free.values()) == [0, 2]
    assert ledger.take("together", [CPU, CPU])
    ledger.release("t1")
    ledger.release("together")
    spread = Ledger({"a": {"CPU": 2}, "b": {"CPU": 2}})
    for trial, size in (("x", 1.5), ("y", 1.5)):
        assert spread.take(trial, [{"CPU": size}])
    assert not spread.fits([{"CPU": 0.5}, {"CPU": 0.5}]), "half a CPU is free on each"


@given(st.data())
def test_never_more_is_booked_than_there_is(data: st.DataObject) -> None:
    sizes = st.sampled_from([0.25, 0.5, 1.0, 2.0])
    nodes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    ledger = Ledger({str(i): {"CPU": float(c)} for i, c in enumerate(nodes)})
    running: list[str] = []
    for i in range(30):
        if running and data.draw(st.booleans()):
            ledger.release(running.pop(data.draw(st.integers(0, len(running) - 1))))
        bundles = [{"CPU": s} for s in data.draw(st.lists(sizes, min_size=1, max_size=3))]
        fits = ledger.fits(bundles)
        if ledger.take(str(i), bundles):
            running.append(str(i))
        assert fits == (str(i) in running)
        assert all(left["CPU"] >= -1e-9 for left in ledger.free.values())
