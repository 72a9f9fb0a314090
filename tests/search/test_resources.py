"""The pool: nothing is over-booked, bundles stay whole, nodes come and go."""

from hypothesis import given
from hypothesis import strategies as st

from raysweep.search.resources import ResourcePool

CPU = {"CPU": 1.0}


def test_books_until_full_and_again_after_release() -> None:
    pool = ResourcePool({"a": {"CPU": 2}})
    assert pool.acquire("t1", [CPU])
    assert pool.acquire("t2", [CPU])
    assert not pool.fits([CPU])
    assert not pool.acquire("t3", [CPU])
    pool.release("t1")
    assert pool.acquire("t3", [CPU])
    assert pool.free == {"a": {"CPU": 0.0}}


def test_a_bundle_is_never_split_over_nodes() -> None:
    pool = ResourcePool({"a": {"CPU": 1}, "b": {"CPU": 1}})
    assert not pool.fits([{"CPU": 2}])
    assert pool.fits([CPU, CPU])
    assert not pool.could_ever_fit([{"CPU": 2}])


def test_small_bundles_fill_the_fullest_node_so_that_large_ones_still_fit() -> None:
    pool = ResourcePool({"a": {"CPU": 4, "GPU": 4}, "b": {"CPU": 4, "GPU": 1}})
    assert pool.acquire("small", [{"CPU": 1, "GPU": 1}])
    assert pool.fits([{"CPU": 1, "GPU": 4}])


def test_fractions_of_a_gpu_add_up_to_one() -> None:
    pool = ResourcePool({"a": {"CPU": 16, "GPU": 1}})
    for i in range(10):
        assert pool.acquire(str(i), [{"CPU": 1, "GPU": 0.1}])
    assert not pool.fits([{"CPU": 1, "GPU": 0.1}])


def test_a_forced_booking_waits_and_a_lost_node_frees_nothing_twice() -> None:
    pool = ResourcePool({"a": {"CPU": 1}})
    assert pool.acquire("big", [{"CPU": 8}], force=True)
    assert pool.free == {"a": {"CPU": 1}}
    assert pool.acquire("t", [CPU])
    pool.update({"b": {"CPU": 1}})
    pool.release("t")
    pool.release("t")
    assert pool.free == {"b": {"CPU": 1}}


def test_a_group_keeps_what_it_holds_for_the_next_trial_of_its_kind() -> None:
    pool = ResourcePool({"a": {"CPU": 4}})
    assert pool.acquire("t1", [CPU, CPU])
    group = pool.group_of("t1")
    pool.release("t1")
    assert pool.free == {"a": {"CPU": 2.0}}
    assert pool.waiting_groups == {group: [CPU, CPU]}
    assert pool.acquire("t2", [CPU, CPU])
    assert pool.group_of("t2") == group
    assert pool.free == {"a": {"CPU": 2.0}}
    assert pool.acquire("t3", [CPU, CPU])
    assert pool.group_of("t3") != group
    pool.release("t2")
    assert not pool.fits([CPU])
    assert group is not None
    pool.give_back(group)
    assert pool.fits([CPU, CPU])
    assert pool.take_ended() == [group]
    assert pool.take_ended() == []


def test_a_group_that_has_lost_a_node_is_given_up() -> None:
    pool = ResourcePool({"a": {"CPU": 1}, "b": {"CPU": 1}})
    for trial in ("running", "waiting"):
        assert pool.acquire(trial, [CPU, CPU])
        group = pool.group_of(trial)
        if trial == "waiting":
            pool.release(trial)
        pool.update({"a": {"CPU": 1}})
        pool.release(trial)
        assert pool.take_ended() == [group]
        assert pool.free == {"a": {"CPU": 1}}
        pool.update({"a": {"CPU": 1}, "b": {"CPU": 1}})


def test_workers_of_a_trial_stay_on_one_node_if_any_could_hold_them() -> None:
    pool = ResourcePool({"a": {"CPU": 2}, "b": {"CPU": 2}})
    assert pool.on_one_node([CPU, CPU])
    assert not pool.on_one_node([CPU] * 3)
    assert pool.fits([CPU] * 3)
    for trial in ("t1", "t2"):
        assert pool.acquire(trial, [CPU])
    pool.release("t1")
    assert pool.acquire("t1", [CPU])
    assert sorted(left["CPU"] for left in pool.free.values()) == [0, 2]
    assert pool.acquire("together", [CPU, CPU])
    pool.release("t1")
    pool.release("together")
    spread = ResourcePool({"a": {"CPU": 2}, "b": {"CPU": 2}})
    for trial, size in (("x", 1.5), ("y", 1.5)):
        assert spread.acquire(trial, [{"CPU": size}])
    assert not spread.fits([{"CPU": 0.5}, {"CPU": 0.5}]), "half a CPU is free on each"


@given(st.data())
def test_never_more_is_booked_than_there_is(data: st.DataObject) -> None:
    sizes = st.sampled_from([0.25, 0.5, 1.0, 2.0])
    nodes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    pool = ResourcePool({str(i): {"CPU": float(c)} for i, c in enumerate(nodes)})
    running: list[str] = []
    for i in range(30):
        if running and data.draw(st.booleans()):
            pool.release(running.pop(data.draw(st.integers(0, len(running) - 1))))
        bundles = [{"CPU": s} for s in data.draw(st.lists(sizes, min_size=1, max_size=3))]
        fits = pool.fits(bundles)
        if pool.acquire(str(i), bundles):
            running.append(str(i))
        assert fits == (str(i) in running)
        assert all(left["CPU"] >= -1e-9 for left in pool.free.values())
