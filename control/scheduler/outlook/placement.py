"""Placement: which workers make up a group of a given width.

Wanted, in this order: a start that waits for nobody; current holders (no transfer); the group of
the step before, then any group whose members know each other; an aligned power-of-two block of the
cluster order (they do not straddle hosts or halves, and few distinct groups ever come up); few
hosts. Members of a group stand in cluster order, always, so that the same set is the same group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..books.cluster import Cluster
from ..books.lifecycle import WorkerState

WARM_GROUPS_MAX = 64  # known groups looked at per binding, newest first


@dataclass(frozen=True, slots=True)
class Demand:
    """One job that needs a group of `degree` workers."""

    degree: int
    step_us: int  # how much waiting matters
    ready_us: int  # starts no earlier, whatever the workers do
    group: tuple[str, ...]  # ran its step before
    holders: tuple[str, ...]


class Placement:
    """Binds demands one after the other; a worker is bound at most once."""

    def __init__(self, cluster: Cluster, free_us: Mapping[str, int]) -> None:
        """`free_us`: the workers that may be bound, and when each is free."""
        self._cluster = cluster
        living = (w for w in cluster.ordered() if w.state is not WorkerState.LOST)
        self._order = [w.name for w in living]
        self._rank = {name: i for i, name in enumerate(self._order)}
        self._free_us = dict(free_us)

    @property
    def left(self) -> int:
        return len(self._free_us)

    def free_us(self, members: Iterable[str]) -> int:
        """When the last of these workers is free."""
        return max(self._free_us[m] for m in members)

    def find(self, demand: Demand, able: Iterable[str]) -> tuple[str, ...] | None:
        """The best group among able, unbound workers; None when they are too few."""
        allowed = set(able)
        open_ = [n for n in self._order if n in self._free_us and n in allowed]
        if len(open_) < demand.degree:
            return None
        found = {self._greedy(demand, open_): None}
        usable = set(open_)
        for members in self._known(demand):
            if len(members) == demand.degree and usable.issuperset(members):
                found[members] = None
        return min(found, key=lambda members: self._cost(demand, members))

    def bind(self, members: Iterable[str]) -> None:
        """Takes the workers out of the pool."""
        for name in members:
            del self._free_us[name]

    def _known(self, demand: Demand) -> Iterable[tuple[str, ...]]:
        """The group before, aligned blocks (also of that group), warm groups."""
        yield demand.group
        for order in (demand.group, self._order):
            for i in range(0, len(order), demand.degree):
                yield tuple(order[i : i + demand.degree])
        yield from self._cluster.warm_groups(demand.degree)[-WARM_GROUPS_MAX:]

    def _greedy(self, demand: Demand, open_: Sequence[str]) -> tuple[str, ...]:
        """Holders, then earliest free, then near the holders in cluster order."""
        held = set(demand.holders)
        hosts = {self._cluster.workers[n].host for n in open_ if n in held}
        ordered = sorted(
            open_,
            key=lambda n: (
                self._waits(demand, self._free_us[n]),
                n not in held,
                demand.degree > 1 or not self._cluster.workers[n].suspected,
                self._cluster.workers[n].host not in hosts,
                self._rank[n],
            ),
        )
        return self._cluster.canonical(ordered[: demand.degree])

    def _waits(self, demand: Demand, free_us: int) -> int:
        """Waiting in whole steps: less than half a step is no reason to move."""
        return (max(0, free_us - demand.ready_us) + demand.step_us // 2) // demand.step_us

    def _cost(self, demand: Demand, members: tuple[str, ...]) -> tuple[int, ...]:
        first = self._rank[members[0]]
        block = self._order[first : first + len(members)]
        aligned = first % len(members) == 0 and tuple(block) == members
        return (
            self._waits(demand, self.free_us(members)),
            -len(set(members) & set(demand.holders)),
            not self._cluster.workers[members[0]].suspected if len(members) == 1 else 0,
            members != demand.group,
            len({self._cluster.workers[m].host for m in members}),
            not self._cluster.warm(members),
            not aligned,
            self.free_us(members),
            *(self._rank[m] for m in members),
        )
