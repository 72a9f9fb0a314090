"""The pool: nothing is over-booked, bundles stay whole, nodes come and go."""

from hypothesis import given, settings
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


def gpu_nodes(count: int) -> dict[str, dict[str, float]]:
    return {f"n{i}": {"CPU": 96.0, "GPU": 8.0} for i in range(count)}


GPU = {"CPU": 4.0, "GPU": 1.0}


def test_a_group_larger_than_a_node_takes_whole_nodes() -> None:
    pool = ResourcePool(gpu_nodes(3))
    assert pool.acquire("small", [GPU])
    assert pool.fits([GPU] * 16)
    assert not pool.fits([GPU] * 17), "on two whole nodes and one GPU of the third"
    assert pool.acquire("group", [GPU] * 16)
    assert sorted(set(pool.nodes_of("group"))) == ["n1", "n2"]
    odd = ResourcePool({"a": {"GPU": 3.0}, "b": {"GPU": 3.0}})
    assert odd.acquire("one", [{"GPU": 1.0}])
    assert odd.fits([{"GPU": 1.0}] * 5) is False, "an empty cluster would hold it on whole nodes"


def test_a_trial_that_lost_a_node_gets_the_next_one_before_any_other() -> None:
    pool = ResourcePool(gpu_nodes(3))
    assert pool.acquire("group", [GPU] * 16)
    assert pool.acquire("small", [GPU])
    pool.update({n: total for n, total in gpu_nodes(3).items() if n != "n0"})
    assert pool.displaced == {"group": [GPU] * 8}
    assert sum(left["GPU"] for left in pool.free.values()) == 7, "what it still has stays booked"
    pool.update({"n1": gpu_nodes(3)["n1"], "n2": gpu_nodes(3)["n2"], "new": {"CPU": 96, "GPU": 8}})
    assert pool.displaced == {}
    assert set(pool.nodes_of("group")) == {"n1", "new"}
    assert pool.free["new"] == {"CPU": 64.0, "GPU": 0.0}
    pool.update({"n2": gpu_nodes(3)["n2"]})
    pool.release("small")
    assert pool.displaced, "sixteen bundles need two nodes"
    assert pool.fits([GPU] * 8)


def test_a_group_is_booked_where_its_workers_are_found() -> None:
    pool = ResourcePool(gpu_nodes(2))
    assert pool.acquire("small", [GPU])
    assert pool.acquire("t", [GPU] * 4)
    group = pool.group_of("t")
    assert group is not None
    assert set(pool.nodes_of("t")) == {"n0"}
    pool.found(group, ["n1"] * 3)  # one has not been heard of
    pool.found(group, ["n1"] * 3 + ["gone"])
    pool.found("other", ["n1"] * 4)
    assert set(pool.nodes_of("t")) == {"n0"}
    pool.found(group, ["n1"] * 4)
    assert {n: left["GPU"] for n, left in pool.free.items()} == {"n0": 7, "n1": 4}
    pool.release("t")
    pool.found(group, ["n0"] * 4)
    assert {n: left["GPU"] for n, left in pool.free.items()} == {"n0": 3, "n1": 8}


def test_nodes_are_reserved_where_they_are_empty_soonest() -> None:
    pool = ResourcePool(gpu_nodes(4))
    for i in range(4):
        assert pool.acquire(f"t{i}", [GPU] * 8)
    ends = {"t0": 10.0, "t1": 40.0, "t2": 30.0, "t3": 20.0}
    found = pool.reserve([GPU] * 16, ends, 5.0)
    assert found is not None
    nodes = {pool.nodes_of(t)[0] for t in ("t0", "t3")}
    assert (found.nodes, found.ready) == (nodes, 20.0)
    assert found.idle == 5.0, "half of it for ten seconds"
    assert pool.reserve([GPU] * 33, ends, 5.0) is None
    one = pool.reserve([GPU], ends, 15.0)
    assert one is not None
    assert (one.nodes, one.ready) == (frozenset(pool.nodes_of("t0")), 15.0), "it is overdue"
    pool.release("t0")
    pool.give_back(*pool.waiting_groups)
    assert pool.fits([GPU])
    assert not pool.fits([GPU], avoid=found.nodes)


@settings(deadline=None)
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
