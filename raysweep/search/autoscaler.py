"""Making a cluster grow: what waiting trials would need, kept where Ray's autoscaler sees it.

Tune is only handed trials that fit, and the autoscaler adds nodes only for what does not. So the
driver keeps placement groups waiting for the trials that could start if there were room: at most
as many as run already, so that a cluster doubles at most each time. They end with the driver,
however it ends. One that is granted is given back at once: its room is for a trial.

A fixed cluster grants one when a trial's room falls free for a moment. So once some have been
granted without a new node, none are asked for until the cluster has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from raysweep.search.resources import Bundle

Kind = tuple[tuple[tuple[str, float], ...], ...]
"""Bundles of a trial, in a form that can be a key."""

MAX_WAITING = 64
"""Placement groups that wait at once, at most."""
GRANTS_WITHOUT_GROWTH = 3
"""So many granted without a new node show that the cluster is fixed."""


class Request(Protocol):
    """A placement group that waits."""

    def granted(self) -> bool: ...
    def withdraw(self) -> None: ...


class AutoscalerRequests:
    """Keeps requests for more room up to date.

    Args:
        ask: makes a request for bundles.
    """

    def __init__(self, ask: Callable[[Sequence[Bundle]], Request]) -> None:
        self._ask = ask
        self._waiting: list[tuple[Kind, Request]] = []
        self._nodes: frozenset[str] = frozenset()
        self._idle_grants = 0

    def update(self, wanted: Mapping[Kind, int], running: int, nodes: Collection[str]) -> None:
        """Bring requests in line.

        Args:
            wanted: trials that could start if there were room, by what they need.
            running: trials that run now.
            nodes: ids of the nodes there are.
        """
        grown = frozenset(nodes) - self._nodes
        if frozenset(nodes) != self._nodes:
            self._nodes, self._idle_grants = frozenset(nodes), 0
        limit = min(MAX_WAITING, max(1, running))
        kept: Counter[Kind] = Counter()
        waiting: list[tuple[Kind, Request]] = []
        for kind, request in self._waiting:
            granted = request.granted()
            self._idle_grants += granted and not grown
            if granted or kept[kind] >= min(limit, wanted.get(kind, 0)):
                request.withdraw()
            else:
                kept[kind] += 1
                waiting.append((kind, request))
        self._waiting = waiting
        if self._idle_grants >= GRANTS_WITHOUT_GROWTH:
            self.withdraw()
            return
        for kind, count in wanted.items():
            for _ in range(min(limit, count) - kept[kind]):
                self._waiting.append((kind, self._ask([dict(bundle) for bundle in kind])))

    def withdraw(self) -> None:
        """Ask for nothing more."""
        for _, request in self._waiting:
            request.withdraw()
        self._waiting = []


class PlacementRequest:
    """A placement group of this driver's."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        from ray.util import placement_group

        self._group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")

    def granted(self) -> bool:
        """Whether the cluster has room for it now."""
        return self._group.wait(timeout_seconds=0)

    def withdraw(self) -> None:
        """Give its room back, or stop waiting."""
        from ray.util import remove_placement_group

        remove_placement_group(self._group)


def kind_of(bundles: Sequence[Bundle]) -> Kind:
    """What a trial needs, as a key."""
    return tuple(tuple(sorted(bundle.items())) for bundle in bundles)
