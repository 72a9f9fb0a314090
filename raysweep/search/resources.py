"""Which resources are free, and on which nodes a trial goes: so that no more is handed out than the
cluster has, small trials fill nodes up, and groups of workers find whole ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Bundle = Mapping[str, float]
"""Resources that must come from one node, e.g. {"CPU": 1, "GPU": 0.5}."""
Kind = tuple[tuple[tuple[str, float], ...], ...]
"""Bundles of a trial, in a form that can be a key."""

_SLACK = 1e-9
_Booking = list[tuple[str, Bundle]]


@dataclass(frozen=True)
class Reservation:
    """Nodes that are kept for a trial which waits for them."""

    nodes: frozenset[str]
    ready: float
    """When they are expected to be free."""
    idle: float
    """What of them is expected to be free until then, over what is waited for, in seconds."""


class ResourcePool:
    """Books what each trial takes from which node. Nodes are known by id, with their totals.

    The bundles of a trial that some node could hold together go on one node; those of one that
    needs more go on whole nodes, where the cluster has as many.

    A trial of several bundles runs in a group of workers, which keeps its resources when the trial
    is over: the next trial of the same bundles takes it over, until it is given back. A running
    trial that has lost nodes gets the next ones that fall free, before any other.
    """

    def __init__(self, nodes: Mapping[str, Bundle]) -> None:
        self.version = 0
        """Grows whenever something is booked or given back, or nodes come or go."""
        self._totals: dict[str, dict[str, float]] = {}
        self._free: dict[str, dict[str, float]] = {}
        self._booked: dict[str, _Booking] = {}
        self._groups: dict[str, str] = {}
        """The group that a trial runs in."""
        self._idle: dict[str, _Booking] = {}
        """What groups hold that wait for a trial."""
        self._displaced: dict[str, None] = {}
        """Trials that have lost a node and have no other yet, in order."""
        self._ended: list[str] = []
        self._named = 0
        self._roomy: dict[tuple[Kind, str], bool] = {}
        """What an empty cluster of these nodes could hold, on one of them or at all."""
        self._sums: dict[str, float] = {}
        self.update(nodes)

    def update(self, nodes: Mapping[str, Bundle]) -> None:
        """The cluster as it is now: nodes may have come or gone. Bookings stay, but for those of
        waiting groups that have lost a node."""
        totals = {node: dict(total) for node, total in nodes.items()}
        if totals == self._totals:
            return
        self.version += 1
        self._totals = totals
        self._roomy.clear()
        self._sums.clear()
        for group, booking in list(self._idle.items()):
            if any(node not in totals for node, _ in booking):
                self._idle.pop(group)
                self._ended.append(group)
        self._free = {node: dict(total) for node, total in totals.items()}
        for booking in (*self._booked.values(), *self._idle.values()):
            self._add(booking, -1.0)
        for trial, booking in self._booked.items():
            if any(node and node not in totals for node, _ in booking):
                self._displaced.setdefault(trial)
        self._settle()

    @property
    def nodes(self) -> frozenset[str]:
        """Ids of the nodes there are."""
        return frozenset(self._totals)

    @property
    def free(self) -> dict[str, dict[str, float]]:
        """What is left on each node."""
        return {node: dict(left) for node, left in self._free.items()}

    @property
    def displaced(self) -> dict[str, list[Bundle]]:
        """Running trials that have lost a node and wait for another, and the bundles they lack."""
        return {trial: self._lost(trial) for trial in self._displaced}

    def total(self, name: str) -> float:
        """Amount of a resource in the whole cluster."""
        if name not in self._sums:
            self._sums[name] = sum(total.get(name, 0.0) for total in self._totals.values())
        return self._sums[name]

    def fits(self, bundles: Sequence[Bundle], avoid: Collection[str] = ()) -> bool:
        """Whether a trial with these bundles could start now, in a waiting group or a new one;
        nodes to `avoid` are kept for others."""
        return self._waiting(bundles, avoid) is not None or bool(self._place(bundles, avoid))

    def could_ever_fit(self, bundles: Sequence[Bundle]) -> bool:
        """Whether an empty cluster of the present nodes could hold it."""
        return self._could(bundles, "at all")

    def on_one_node(self, bundles: Sequence[Bundle]) -> bool:
        """Whether some node is large enough for all of them: then they are put on one."""
        return self._could(bundles, "together")

    def acquire(
        self,
        trial: str,
        bundles: Sequence[Bundle],
        *,
        avoid: Collection[str] = (),
        force: bool = False,
    ) -> bool:
        """Book a trial. With `force` it is booked on any node although it does not fit: it waits
        there for the cluster to grow. Returns whether it is booked."""
        assert trial not in self._booked, trial
        if (group := self._waiting(bundles, avoid)) is not None:
            self.version += 1
            self._booked[trial], self._groups[trial] = self._idle.pop(group), group
            return True
        nodes = self._place(bundles, avoid)
        if nodes is None:
            if not force:
                return False
            nodes = [""] * len(bundles)
        self.version += 1
        self._booked[trial] = list(zip(nodes, bundles, strict=True))
        self._add(self._booked[trial], -1.0)
        if len(bundles) > 1:
            self._named += 1
            self._groups[trial] = f"group-{self._named}"
        return True

    def release(self, trial: str) -> None:
        """Give back what a trial held, or keep it in its group; one that holds nothing is no error.
        Of a group whose nodes are not known, or gone, nothing is kept."""
        booking, group = self._booked.pop(trial, None), self._groups.pop(trial, None)
        if booking is None:
            return
        self.version += 1
        self._displaced.pop(trial, None)
        if group is not None and all(node in self._totals for node, _ in booking):
            self._idle[group] = booking
            return
        self._add(booking, 1.0)
        if group is not None:
            self._ended.append(group)
        self._settle()

    def nodes_of(self, trial: str) -> list[str]:
        """The node of each bundle of a trial; of one that waits for its place, some are gone."""
        return [node for node, _ in self._booked.get(trial, ())]

    def group_of(self, trial: str) -> str | None:
        """The group that a trial of several bundles runs in."""
        return self._groups.get(trial)

    def found(self, group: str, nodes: Sequence[str]) -> None:
        """A group's workers are on these nodes: it is booked there, wherever it was booked before.
        Nothing changes while some are not known, or for a group that is not."""
        booked = {self._groups[trial]: booking for trial, booking in self._booked.items()
                  if trial in self._groups}  # fmt: skip
        booking = booked.get(group, self._idle.get(group, []))
        same = sorted(nodes) == sorted(node for node, _ in booking)
        if same or len(nodes) != len(booking) or not self._totals.keys() >= set(nodes):
            return
        self.version += 1
        self._add(booking, 1.0)
        booking[:] = [(node, bundle) for node, (_, bundle) in zip(nodes, booking, strict=True)]
        self._add(booking, -1.0)
        for trial in [t for t in self._displaced if self._groups.get(t) == group]:
            del self._displaced[trial]
        self._settle()

    @property
    def waiting_groups(self) -> dict[str, list[Bundle]]:
        """Groups without a trial, and their bundles."""
        return {group: [b for _, b in booking] for group, booking in self._idle.items()}

    def give_back(self, group: str) -> None:
        """Give up a waiting group: its resources are free."""
        self.version += 1
        self._add(self._idle.pop(group), 1.0)
        self._ended.append(group)
        self._settle()

    def take_ended(self) -> list[str]:
        """Groups that were given up since the last call: whoever runs them should end them."""
        ended, self._ended = self._ended, []
        return ended

    def reserve(
        self, bundles: Sequence[Bundle], ends: Mapping[str, float], now: float
    ) -> Reservation | None:
        """The nodes on which bundles that do not fit now can start first, given when the running
        trials are expected to end; None if an empty cluster could not hold them."""
        if not self.could_ever_fit(bundles):
            return None
        falls_free: dict[str, list[tuple[float, Bundle]]] = {node: [] for node in self._totals}
        for trial, booking in self._booked.items():
            for node, bundle in booking:
                if node in falls_free:
                    falls_free[node].append((max(now, ends.get(trial, math.inf)), bundle))
        for booking in self._idle.values():
            for node, bundle in booking:
                falls_free[node].append((now, bundle))
        if self.on_one_node(bundles):
            whole = _sum(bundles)
            times = {
                node: _first_time(self._free[node], freed, whole, now)
                for node, freed in falls_free.items()
                if _holds(self._totals[node], whole)
            }
            node = min(times, key=lambda n: (times[n], n))
            return self._reservation([node], times[node], falls_free, bundles, now)
        times = {n: max((t for t, _ in freed), default=now) for n, freed in falls_free.items()}
        empty: dict[str, dict[str, float]] = {}
        for node in sorted(times, key=lambda n: (times[n], n)):
            empty[node] = dict(self._totals[node])
            nodes = _place(bundles, {n: dict(total) for n, total in empty.items()})
            if nodes is not None:
                ready = max(times[n] for n in set(nodes))
                return self._reservation(nodes, ready, falls_free, bundles, now)
        return None

    def _reservation(
        self,
        nodes: Iterable[str],
        ready: float,
        falls_free: Mapping[str, Sequence[tuple[float, Bundle]]],
        bundles: Sequence[Bundle],
        now: float,
    ) -> Reservation:
        name = "GPU" if bundles[0].get("GPU") else "CPU"
        idle = 0.0
        for node in set(nodes):
            idle += self._free[node].get(name, 0.0) * (ready - now)
            for when, bundle in falls_free[node]:
                idle += bundle.get(name, 0.0) * max(0.0, ready - when)
        return Reservation(frozenset(nodes), ready, idle / _sum(bundles)[name])

    def _waiting(self, bundles: Sequence[Bundle], avoid: Collection[str] = ()) -> str | None:
        if len(bundles) > 1:
            for group, booking in self._idle.items():
                if [b for _, b in booking] == list(bundles) and not (
                    avoid and any(node in avoid for node, _ in booking)
                ):
                    return group
        return None

    def _place(self, bundles: Sequence[Bundle], avoid: Collection[str] = ()) -> list[str] | None:
        """A node for each bundle; None if there is none."""
        free = (
            {n: left for n, left in self._free.items() if n not in avoid} if avoid else self._free
        )
        if len(bundles) > 1:
            if self.on_one_node(bundles):
                whole = _sum(bundles)
                fitting = [node for node, left in free.items() if _holds(left, whole)]
                node = min(fitting, key=lambda n: (_size(free[n]), n), default=None)
                return None if node is None else [node] * len(bundles)
            if self.could_ever_fit(bundles):  # empty nodes alone would do
                free = {n: left for n, left in free.items() if _holds(left, self._totals[n])}
        elif bundles:  # which is most of what is asked
            fitting = [node for node, left in free.items() if _holds(left, bundles[0])]
            node = min(fitting, key=lambda n: (_size(free[n]), n), default=None)
            return None if node is None else [node]
        return _place(bundles, {node: dict(left) for node, left in free.items()})

    def _could(self, bundles: Sequence[Bundle], how: str) -> bool:
        """Whether an empty cluster of the present nodes could hold bundles so."""
        key = kind_of(bundles), how
        if key not in self._roomy:
            if how == "together":
                whole = _sum(bundles)
                found = any(_holds(total, whole) for total in self._totals.values())
            else:
                found = _place(bundles, {n: dict(t) for n, t in self._totals.items()}) is not None
            self._roomy[key] = found
        return self._roomy[key]

    def _lost(self, trial: str) -> list[Bundle]:
        return [bundle for node, bundle in self._booked[trial] if node not in self._totals]

    def _settle(self) -> None:
        """Give trials that have lost nodes others, as far as there is room."""
        for trial in list(self._displaced):
            booking = self._booked[trial]
            lost = self._lost(trial)
            nodes = self._place(lost)
            if nodes is None:
                continue
            self.version += 1
            del self._displaced[trial]
            there = iter(nodes)
            placed = [
                (node if node in self._totals else next(there), bundle) for node, bundle in booking
            ]
            self._booked[trial] = placed
            self._add(zip(nodes, lost, strict=True), -1.0)

    def _add(self, booking: Iterable[tuple[str, Bundle]], sign: float) -> None:
        for node, bundle in booking:
            left = self._free.get(node)
            if left is not None:
                for name, amount in bundle.items():
                    left[name] = left.get(name, 0.0) + sign * amount


def kind_of(bundles: Sequence[Bundle]) -> Kind:
    """What a trial needs, as a key."""
    return tuple(tuple(sorted(bundle.items())) for bundle in bundles)


def _place(bundles: Sequence[Bundle], free: dict[str, dict[str, float]]) -> list[str] | None:
    """A node for each bundle, largest first and the fullest node that fits; None if none does."""
    nodes = [""] * len(bundles)
    node = None
    for i in sorted(range(len(bundles)), key=lambda i: _size(bundles[i]), reverse=True):
        bundle = bundles[i]
        if node is None or not _holds(free[node], bundle):  # else it is the fullest still
            fitting = [node for node, left in free.items() if _holds(left, bundle)]
            if not fitting:
                return None
            node = min(fitting, key=lambda n: (_size(free[n]), n))
        for name, amount in bundle.items():
            free[node][name] = free[node].get(name, 0.0) - amount
        nodes[i] = node
    return nodes


def _first_time(
    free: Bundle, freed: Sequence[tuple[float, Bundle]], needed: Bundle, now: float
) -> float:
    """When a node holds what is needed, as resources fall free on it at given times."""
    left = dict(free)
    if _holds(left, needed):
        return now
    for when, bundle in sorted(freed, key=lambda each: each[0]):
        for name, amount in bundle.items():
            left[name] = left.get(name, 0.0) + amount
        if _holds(left, needed):
            return when
    return math.inf


def _sum(bundles: Sequence[Bundle]) -> dict[str, float]:
    together: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            together[name] = together.get(name, 0.0) + amount
    return together


def _holds(left: Bundle, bundle: Bundle) -> bool:
    return all(left.get(name, 0.0) + _SLACK >= amount for name, amount in bundle.items())


def _size(bundle: Bundle) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)
