"""Making a cluster grow: what waiting trials would need, kept where Ray's autoscaler sees it.

Tune is only handed trials that fit, and the autoscaler adds nodes only for what does not. So the
driver keeps placement groups waiting for the trials that could start if there were room: together
no more than the cluster has already, so that it doubles at most each time. They end with the
driver, however it ends. One that is granted is given back at once: its room is for a trial.

A fixed cluster grants one when a trial's room falls free for a moment. So once some have been
granted without a new node, none are asked for until the cluster has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from raysweep.search.resources import Bundle, Kind, ResourcePool

MAX_WAITING = 64
"""Placement groups that wait at once, at most: all kinds together."""
GRANTS_WITHOUT_GROWTH = 3
"""So many granted without a new node show that the cluster is fixed."""


class Request(Protocol):
    """A placement group that waits."""

    def granted(self) -> bool: ...
    def withdraw(self) -> None: ...


class AutoscalerRequests:
    """Keeps requests for more room up to date.

    Args:
        ask: makes a request for bundles, which one node must hold together or not.
    """

    def __init__(self, ask: Callable[[Sequence[Bundle], bool], Request]) -> None:
        self._ask = ask
        self._waiting: list[tuple[Kind, Request]] = []
        self._nodes: frozenset[str] = frozenset()
        self._idle_grants = 0

    def update(self, wanted: Mapping[Kind, int], pool: ResourcePool) -> None:
        """Bring requests in line.

        Args:
            wanted: trials that could start if there were room, by what they need.
            pool: what the cluster has now.
        """
        nodes = pool.nodes
        grown = frozenset(nodes) - self._nodes
        if frozenset(nodes) != self._nodes:
            self._nodes, self._idle_grants = frozenset(nodes), 0
        limits = _within(wanted, pool)
        kept: Counter[Kind] = Counter()
        waiting: list[tuple[Kind, Request]] = []
        for kind, request in self._waiting:
            granted = request.granted()
            self._idle_grants += granted and not grown
            if granted or kept[kind] >= limits[kind]:
                request.withdraw()
            else:
                kept[kind] += 1
                waiting.append((kind, request))
        self._waiting = waiting
        if self._idle_grants >= GRANTS_WITHOUT_GROWTH:
            self.withdraw()
            return
        for kind, count in limits.items():
            bundles = [dict(bundle) for bundle in kind]
            for _ in range(count - kept[kind]):
                request = self._ask(bundles, len(bundles) > 1 and pool.on_one_node(bundles))
                self._waiting.append((kind, request))

    def withdraw(self) -> None:
        """Ask for nothing more."""
        for _, request in self._waiting:
            request.withdraw()
        self._waiting = []


def _within(wanted: Mapping[Kind, int], pool: ResourcePool) -> Counter[Kind]:
    """How many of each kind to ask for: in order, and together no more of each resource than the
    cluster has; at least one."""
    limits: Counter[Kind] = Counter()
    asked: Counter[str] = Counter()
    for kind, count in wanted.items():
        name = "GPU" if any(dict(bundle).get("GPU") for bundle in kind) else "CPU"
        size = sum(dict(bundle).get(name, 0.0) for bundle in kind)
        for _ in range(count):
            full = asked[name] + size > pool.total(name) or limits.total() >= MAX_WAITING
            if full and limits:
                break
            limits[kind] += 1
            asked[name] += size  # pyright: ignore[reportArgumentType]
    return limits


class PlacementRequest:
    """A placement group of this driver's; `strict` keeps it on one node."""

    def __init__(self, bundles: Sequence[Bundle], strict: bool) -> None:
        from ray.util import placement_group

        self._group = placement_group(
            [dict(bundle) for bundle in bundles], strategy="STRICT_PACK" if strict else "PACK"
        )

    def granted(self) -> bool:
        """Whether the cluster has room for it now."""
        return self._group.wait(timeout_seconds=0)

    def withdraw(self) -> None:
        """Give its room back, or stop waiting."""
        from ray.util import remove_placement_group

        remove_placement_group(self._group)
