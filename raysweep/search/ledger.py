"""Which resources are free: so that no more is handed out than the cluster has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Bundle = Mapping[str, float]
"""Resources that must come from one node, e.g. {"CPU": 1, "GPU": 0.5}."""

_SLACK = 1e-9


class Ledger:
    """Books what each trial takes from which node. Nodes are known by id, with their totals."""

    def __init__(self, nodes: Mapping[str, Bundle]) -> None:
        self._totals: dict[str, dict[str, float]] = {}
        self._booked: dict[str, list[tuple[str, Bundle]]] = {}
        self.update(nodes)

    def update(self, nodes: Mapping[str, Bundle]) -> None:
        """The cluster as it is now: nodes may have come or gone. Bookings stay."""
        self._totals = {node: dict(total) for node, total in nodes.items()}

    @property
    def nodes(self) -> frozenset[str]:
        """Ids of the nodes there are."""
        return frozenset(self._totals)

    @property
    def free(self) -> dict[str, dict[str, float]]:
        """What is left on each node."""
        left = {node: dict(total) for node, total in self._totals.items()}
        for placements in self._booked.values():
            for node, bundle in placements:
                for name, amount in bundle.items():
                    if node in left:
                        left[node][name] = left[node].get(name, 0.0) - amount
        return left

    def total(self, name: str) -> float:
        """Amount of a resource in the whole cluster."""
        return sum(total.get(name, 0.0) for total in self._totals.values())

    def fits(self, bundles: Sequence[Bundle]) -> bool:
        """Whether a trial with these bundles could start now."""
        return _place(bundles, self.free) is not None

    def could_ever_fit(self, bundles: Sequence[Bundle]) -> bool:
        """Whether an empty cluster of the present nodes could hold it."""
        return _place(bundles, {n: dict(t) for n, t in self._totals.items()}) is not None

    def take(self, trial: str, bundles: Sequence[Bundle], *, force: bool = False) -> bool:
        """Book a trial. With `force` it is booked on any node although it does not fit: it waits
        there for the cluster to grow. Returns whether it is booked."""
        assert trial not in self._booked, trial
        nodes = _place(bundles, self.free)
        if nodes is None:
            if not force:
                return False
            nodes = [""] * len(bundles)
        self._booked[trial] = list(zip(nodes, bundles, strict=True))
        return True

    def release(self, trial: str) -> None:
        """Give back what a trial held; one that holds nothing is no error."""
        self._booked.pop(trial, None)


def _place(bundles: Sequence[Bundle], free: dict[str, dict[str, float]]) -> list[str] | None:
    """A node for each bundle, largest first and the fullest node that fits; None if none does."""
    nodes = [""] * len(bundles)
    by_size = sorted(range(len(bundles)), key=lambda i: _size(bundles[i]), reverse=True)
    for i in by_size:
        bundle = bundles[i]
        fitting = [
            node
            for node, left in free.items()
            if all(left.get(name, 0.0) + _SLACK >= amount for name, amount in bundle.items())
        ]
        if not fitting:
            return None
        node = min(fitting, key=lambda n: (_size(free[n]), n))
        for name, amount in bundle.items():
            free[node][name] = free[node].get(name, 0.0) - amount
        nodes[i] = node
    return nodes


def _size(bundle: Bundle) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)
