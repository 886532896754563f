"""The board of outstanding assignments, and what it says of the near future.

    worker a   [ r1 steps 0..5 ][ r2 steps 8..9 ]
    worker b   [ r1 steps 0..5 ]      [ r3 encode ]       ── free from here on
    worker c        [ r3 decode .................. ]
               ▲ now

Workers follow one order of sequences, so a forecast is one walk along it: an assignment starts when
its members are free of earlier ones and its job's earlier assignment is over, and lasts its steps.

A job may leave a batch before the others are through: called off, failed, or (its file was stored
first) done. The flight is then of those who stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from ..values import Assignment, Member
from ..workflow import NodeKind
from .cluster import Cluster


@dataclass(slots=True)
class Flight:
    """An assignment on its way."""

    assignment: Assignment  # of the jobs that are still in it
    issued_us: int
    kind: NodeKind  # of its node
    setup_us: int = 0  # loads, transfers and group before the first step, as predicted
    steps_done: int = 0  # reported of its own steps
    reported_us: int | None = None  # when its last report came
    behind_us: int = 0  # when what its jobs had out before it ended
    spent_us: int = 0  # reported of a call that tells job by job
    left: list[Member] = field(default_factory=list)  # called off, or given up, before its end
    size: int = 0  # jobs that it was issued for

    def __post_init__(self) -> None:
        self.size = len(self.assignment.batch)

    def part(self, request: str) -> Member:
        """A job is no longer in it; another one still is."""
        batch = self.assignment.batch
        (gone,) = [m for m in batch if m.request == request]
        rest = tuple(m for m in batch if m is not gone)
        assert rest, "the last job takes the flight along"
        self.assignment = msgspec.structs.replace(self.assignment, batch=rest)
        return gone

    @property
    def steps_left(self) -> int:
        return self.assignment.steps - self.steps_done


@dataclass(slots=True)
class BoardForecast:
    """When what is outstanding will be over."""

    free_us: dict[str, int]  # by worker; not before now
    start_us: dict[int, int]  # by sequence
    end_us: dict[int, int]

    def enter(self, assignment: Assignment) -> None:
        """Takes in an assignment issued now, on workers that it does not leave idle before."""
        self.start_us[assignment.sequence] = assignment.start_us
        self.end_us[assignment.sequence] = assignment.end_us
        for worker in assignment.workers:
            self.free_us[worker] = assignment.end_us


@dataclass(slots=True)
class Board:
    """Outstanding assignments in sequence order; for late reports, those called off."""

    flights: dict[int, Flight] = field(default_factory=dict)
    retired: dict[int, Assignment] = field(default_factory=dict)
    _retired_of: dict[str, list[int]] = field(default_factory=dict)  # by request
    _of_worker: dict[str, deque[int]] = field(default_factory=dict)  # sequences, some of them over
    _of_request: dict[str, deque[int]] = field(default_factory=dict)

    def add(self, flight: Flight) -> None:
        sequence = flight.assignment.sequence
        assert not self.flights or sequence > next(reversed(self.flights)), "one order"
        self.flights[sequence] = flight
        for name in flight.assignment.workers:
            self._join(self._of_worker, name, sequence)
        for member in flight.assignment.batch:
            self._join(self._of_request, member.request, sequence)

    def ahead_of(self, flight: Flight) -> Flight | None:
        """One that has to be over before this one begins: on a worker of it, or of a job of it."""
        a = flight.assignment
        lines = [self._of_worker[name] for name in a.workers]
        lines += [self._of_request[m.request] for m in a.batch if m.request in self._of_request]
        for line in lines:
            first = next((s for s in line if s in self.flights), a.sequence)
            if first < a.sequence:
                return self.flights[first]
        return None

    def behind(self, workers: Iterable[str], requests: Iterable[str]) -> set[int]:
        """What is outstanding on some workers, or of some requests."""
        lines = [self._of_worker.get(name, ()) for name in workers]
        lines += [self._of_request.get(request, ()) for request in requests]
        return {s for line in lines for s in line if s in self.flights}

    def forget_workers(self, names: Iterable[str]) -> None:
        """They are gone for good, and nothing is outstanding on them."""
        for name in names:
            self._of_worker.pop(name, None)

    def _join(self, lines: dict[str, deque[int]], name: str, sequence: int) -> None:
        line = lines.setdefault(name, deque())
        while line and line[0] not in self.flights:
            line.popleft()
        line.append(sequence)

    def end(self, sequence: int) -> Flight:
        """Takes off an assignment that is over."""
        return self.flights.pop(sequence)

    def leave(self, sequence: int, request: str) -> None:
        """A job leaves a batch whose others go on; reports may still tell of it."""
        flight = self.flights[sequence]
        flight.left.append(flight.part(request))
        self._retired_of.setdefault(request, []).append(sequence)

    def call_off(self, sequence: int) -> Flight:
        """Takes off an assignment whose last job shall not go on; a late report of it, and of those
        who left before, can still be told.
        """
        flight = self.flights.pop(sequence)
        whole = (*flight.left, *flight.assignment.batch)
        self.retired[sequence] = msgspec.structs.replace(flight.assignment, batch=whole)
        for member in flight.assignment.batch:
            self._retired_of.setdefault(member.request, []).append(sequence)
        return flight

    def forget(self, request: str) -> None:
        """A request ended: drops called-off assignments that nobody else inside had a part in."""
        self._of_request.pop(request, None)
        for sequence in self._retired_of.pop(request, ()):
            retired = self.retired.get(sequence)
            if retired is not None and not any(
                sequence in self._retired_of.get(m.request, ()) for m in retired.batch
            ):
                del self.retired[sequence]

    def busy(self) -> set[str]:
        """Workers that have something outstanding."""
        return {w for f in self.flights.values() for w in f.assignment.workers}

    def denoising(self) -> bool:
        return any([f.kind is NodeKind.STEPPED for f in self.flights.values()])

    def forecast(self, cluster: Cluster, now_us: int) -> BoardForecast:
        """Predicts starts and ends from mean step times, the last reports, and now."""
        idle_us = {w.name: w.freed_us for w in cluster.ordered()}  # without the "not before now"
        free_us = {name: us if us > now_us else now_us for name, us in idle_us.items()}
        start_us: dict[int, int] = {}
        end_us: dict[int, int] = {}
        job_us: dict[str, int] = {}
        for sequence, flight in self.flights.items():
            a = flight.assignment
            begin = max(flight.issued_us, flight.behind_us)
            for worker in a.workers:
                earlier = idle_us.get(worker, 0)
                if earlier > begin:
                    begin = earlier
            for member in a.batch:
                earlier = job_us.get(member.request, 0)
                if earlier > begin:
                    begin = earlier
            if flight.reported_us is not None:
                end = flight.reported_us + (a.steps - flight.steps_done) * a.step_time_us
            else:
                end = begin + flight.setup_us + a.steps * a.step_time_us
            if end < now_us:
                end = now_us
            start_us[sequence], end_us[sequence] = begin, end
            for worker in a.workers:
                idle_us[worker] = free_us[worker] = end
            for member in a.batch:
                job_us[member.request] = end
        return BoardForecast(free_us, start_us, end_us)

    def step_end_us(self, sequence: int, forecast: BoardForecast, now_us: int) -> int:
        """When an assignment called off now lets its workers go: at the end of its current step."""
        flight = self.flights[sequence]
        if forecast.start_us[sequence] >= now_us:
            return now_us
        begin = flight.reported_us
        if begin is None:
            begin = forecast.start_us[sequence]
        step_us = flight.assignment.step_time_us
        return begin + step_us * (-(-(now_us - begin) // step_us))
