"""Assignments that nobody hears of any more: each has an end by its predicted span.

A device that hangs says nothing, while its process goes on telling that it lives. So an assignment
counts as failed when `hung_after_factor` times what was predicted of the rest of it, and at least
`hung_min_us`, have gone by since its last report, or since it could begin. A group has twice as
long: its own collective time-outs come first. Time in which control itself was deaf or late counts
for nobody.

Ends are kept in a heap and looked at again when they come near, or when something may have brought
them forward: a report, or the end of what is ahead.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..settings import Settings
from ..values import Assignment
from .board import Board, Flight
from .cluster import Cluster

HUNG = "HUNG"  # reason of the failure
LATE_US = 1_000_000  # found this much later than due, it was control that was late
PATIENCE_MAX = 64  # times longer, where an assignment was found hung that was merely slow
_STALE_MAX = 256  # entries of the heap that nothing is made of any more
CELLS_MAX = 1_024  # of models and nodes with patience of their own

Part = tuple[str, str]  # model, node


@dataclass(slots=True)
class Overdue:
    """When each flight is to be taken for hung."""

    settings: Settings
    _ends: list[tuple[int, int]] = field(default_factory=list)  # heap of (end or earlier, sequence)
    _newest: dict[int, int] = field(default_factory=dict)  # by flight: which of its entries holds
    _parts: dict[int, Part] = field(default_factory=dict)  # of the flights in the heap
    _patience: dict[Part, int] = field(default_factory=dict)
    _heard_us: int = 0  # no end is counted from before then

    def issued(self, assignment: Assignment, model: str, now_us: int) -> None:
        """An assignment goes out."""
        if not self.settings.hung_after_factor:
            return
        self._parts[assignment.sequence] = (model, assignment.node)
        self._enter(now_us + self.settings.hung_min_us, assignment.sequence)

    def look_again(self, sequences: Iterable[int]) -> None:
        """The ends of these flights may be earlier than was thought."""
        for sequence in sequences:
            if self._newest.get(sequence):
                self._enter(0, sequence)

    def _enter(self, end_us: int, sequence: int) -> None:
        self._newest[sequence] = end_us
        heapq.heappush(self._ends, (end_us, sequence))

    def deaf(self, at_us: int) -> None:
        """Until now nobody was heard of."""
        self._heard_us = max(self._heard_us, at_us)

    def mistaken(self, assignment: Assignment, model: str) -> None:
        """It was found hung, and reported after all: such calls get longer from now on."""
        part = (model, assignment.node)
        known = self._patience.pop(part, 1)
        if len(self._patience) >= CELLS_MAX:
            del self._patience[next(iter(self._patience))]
        self._patience[part] = min(PATIENCE_MAX, 2 * known)

    def next_us(self, board: Board, cluster: Cluster) -> int | None:
        """When the next flight is overdue if nothing is heard until then."""
        if len(self._ends) > _STALE_MAX + 4 * len(board.flights):
            self._tidy(board)
        ends = self._ends
        while ends:
            end_us, sequence = ends[0]
            flight = board.flights.get(sequence)
            if flight is None or self._newest[sequence] != end_us:
                heapq.heappop(ends)
                continue
            true_us = self._end_us(board, cluster, flight)
            if true_us == end_us:
                return end_us
            heapq.heappop(ends)
            self._enter(true_us, sequence)
        self._tidy(board)
        return None

    def _tidy(self, board: Board) -> None:
        """Drops what is over, and entries that later ones took the place of."""
        self._newest = {s: end for s, end in self._newest.items() if s in board.flights}
        self._parts = {s: part for s, part in self._parts.items() if s in self._newest}
        self._ends = [(end_us, s) for s, end_us in self._newest.items()]
        heapq.heapify(self._ends)

    def find(self, board: Board, cluster: Cluster, now_us: int) -> Flight | None:
        """A flight that is overdue now."""
        end_us = self.next_us(board, cluster)
        if end_us is None or end_us > now_us:
            return None
        if now_us - end_us > LATE_US:
            self.deaf(now_us)
            return self.find(board, cluster, now_us)
        return board.flights[self._ends[0][1]]

    def _end_us(self, board: Board, cluster: Cluster, flight: Flight) -> int:
        """One that waits for others ends, at any rate, behind one of those."""
        allowed_us = self._allowed_us(flight)
        while flight.reported_us is None:
            earlier = board.ahead_of(flight)
            if earlier is None:
                break
            flight = earlier
            allowed_us += self._allowed_us(flight)
        begin_us = flight.reported_us
        if begin_us is None:
            freed_us = [cluster.workers[name].freed_us for name in flight.assignment.workers]
            begin_us = max(flight.issued_us, flight.behind_us, *freed_us)
        return max(begin_us, self._heard_us) + allowed_us

    def _allowed_us(self, flight: Flight) -> int:
        a = flight.assignment
        span_us = flight.steps_left * a.step_time_us_safe
        if flight.reported_us is None:
            span_us += flight.setup_us
        allowed_us = max(self.settings.hung_min_us, int(self.settings.hung_after_factor * span_us))
        patience = self._patience.get(self._parts[a.sequence], 1) if self._patience else 1
        return allowed_us * patience * min(2, len(a.workers))
