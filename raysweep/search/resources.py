"""Which resources are free: so that no more is handed out than the cluster has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Bundle = Mapping[str, float]
"""Resources that must come from one node, e.g. {"CPU": 1, "GPU": 0.5}."""

_SLACK = 1e-9
_Booking = list[tuple[str, Bundle]]


class ResourcePool:
    """Books what each trial takes from which node. Nodes are known by id, with their totals.

    A trial of several bundles runs in a group of workers, which keeps its resources when the trial
    is over: the next trial of the same bundles takes it over, until it is given back.
    """

    def __init__(self, nodes: Mapping[str, Bundle]) -> None:
        self._totals: dict[str, dict[str, float]] = {}
        self._booked: dict[str, _Booking] = {}
        self._groups: dict[str, str] = {}
        """The group that a trial runs in."""
        self._idle: dict[str, _Booking] = {}
        """What groups hold that wait for a trial."""
        self._ended: list[str] = []
        self._named = 0
        self.update(nodes)

    def update(self, nodes: Mapping[str, Bundle]) -> None:
        """The cluster as it is now: nodes may have come or gone. Bookings stay, but for those of
        waiting groups that have lost a node."""
        self._totals = {node: dict(total) for node, total in nodes.items()}
        for group, booking in list(self._idle.items()):
            if any(node not in self._totals for node, _ in booking):
                self.give_back(group)

    @property
    def nodes(self) -> frozenset[str]:
        """Ids of the nodes there are."""
        return frozenset(self._totals)

    @property
    def free(self) -> dict[str, dict[str, float]]:
        """What is left on each node."""
        left = {node: dict(total) for node, total in self._totals.items()}
        for booking in (*self._booked.values(), *self._idle.values()):
            for node, bundle in booking:
                for name, amount in bundle.items():
                    if node in left:
                        left[node][name] = left[node].get(name, 0.0) - amount
        return left

    def total(self, name: str) -> float:
        """Amount of a resource in the whole cluster."""
        return sum(total.get(name, 0.0) for total in self._totals.values())

    def fits(self, bundles: Sequence[Bundle]) -> bool:
        """Whether a trial with these bundles could start now, in a waiting group or a new one."""
        return bool(self._waiting(bundles)) or self._place(bundles, self.free) is not None

    def could_ever_fit(self, bundles: Sequence[Bundle]) -> bool:
        """Whether an empty cluster of the present nodes could hold it."""
        return self._place(bundles, {n: dict(t) for n, t in self._totals.items()}) is not None

    def on_one_node(self, bundles: Sequence[Bundle]) -> bool:
        """Whether some node is large enough for all of them: then they are put on one."""
        together: dict[str, float] = {}
        for bundle in bundles:
            for name, amount in bundle.items():
                together[name] = together.get(name, 0.0) + amount
        return any(_holds(total, together) for total in self._totals.values())

    def acquire(self, trial: str, bundles: Sequence[Bundle], *, force: bool = False) -> bool:
        """Book a trial. With `force` it is booked on any node although it does not fit: it waits
        there for the cluster to grow. Returns whether it is booked."""
        assert trial not in self._booked, trial
        if group := self._waiting(bundles):
            self._booked[trial], self._groups[trial] = self._idle.pop(group), group
            return True
        nodes = self._place(bundles, self.free)
        if nodes is None:
            if not force:
                return False
            nodes = [""] * len(bundles)
        self._booked[trial] = list(zip(nodes, bundles, strict=True))
        if len(bundles) > 1:
            self._named += 1
            self._groups[trial] = f"group-{self._named}"
        return True

    def release(self, trial: str) -> None:
        """Give back what a trial held, or keep it in its group; one that holds nothing is no error.
        Of a group whose nodes are not known, or gone, nothing is kept."""
        booking, group = self._booked.pop(trial, None), self._groups.pop(trial, None)
        if booking is None or group is None:
            return
        if all(node in self._totals for node, _ in booking):
            self._idle[group] = booking
        else:
            self._ended.append(group)

    def group_of(self, trial: str) -> str | None:
        """The group that a trial of several bundles runs in."""
        return self._groups.get(trial)

    @property
    def waiting_groups(self) -> dict[str, list[Bundle]]:
        """Groups without a trial, and their bundles."""
        return {group: [b for _, b in booking] for group, booking in self._idle.items()}

    def give_back(self, group: str) -> None:
        """Give up a waiting group: its resources are free."""
        del self._idle[group]
        self._ended.append(group)

    def take_ended(self) -> list[str]:
        """Groups that were given up since the last call: whoever runs them should end them."""
        ended, self._ended = self._ended, []
        return ended

    def _waiting(self, bundles: Sequence[Bundle]) -> str | None:
        if len(bundles) > 1:
            for group, held in self.waiting_groups.items():
                if held == list(bundles):
                    return group
        return None

    def _place(
        self, bundles: Sequence[Bundle], free: dict[str, dict[str, float]]
    ) -> list[str] | None:
        """A node for each bundle; None if there is none."""
        if len(bundles) > 1 and self.on_one_node(bundles):
            for node in sorted(free, key=lambda n: (_size(free[n]), n)):
                if (nodes := _place(bundles, {node: dict(free[node])})) is not None:
                    return nodes
            return None
        return _place(bundles, free)


def _place(bundles: Sequence[Bundle], free: dict[str, dict[str, float]]) -> list[str] | None:
    """A node for each bundle, largest first and the fullest node that fits; None if none does."""
    nodes = [""] * len(bundles)
    by_size = sorted(range(len(bundles)), key=lambda i: _size(bundles[i]), reverse=True)
    for i in by_size:
        bundle = bundles[i]
        fitting = [node for node, left in free.items() if _holds(left, bundle)]
        if not fitting:
            return None
        node = min(fitting, key=lambda n: (_size(free[n]), n))
        for name, amount in bundle.items():
            free[node][name] = free[node].get(name, 0.0) - amount
        nodes[i] = node
    return nodes


def _holds(left: Bundle, bundle: Bundle) -> bool:
    return all(left.get(name, 0.0) + _SLACK >= amount for name, amount in bundle.items())


def _size(bundle: Bundle) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)
