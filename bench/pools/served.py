"""What serves a pool's requests in a simulated day: the real scheduler, or a plain queue.

The scheduler's day takes minutes of a core, the queue's a second: the queue is for many seeds, the
scheduler to see that the queue stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from bench.pools.day import MODEL
from bench.sim.case import ASSETS, Case, ClusterSpec, FaultSpec
from bench.sim.loop import Loop
from control.scheduler.outlook.demand import PoolWork
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import Arrived, Request

PROFILE, GPU = "flux.1-dev_h100_h28.csv", "h100"
BEST_EFFORT_US = 120_000_000  # it is due so long after its last progress
QUANTUM_US = 250_000  # of the queue: about a step
A_HOST = 8


class ServedRequest(NamedTuple):
    """A request that is done."""

    request: Request
    at_us: int

    @property
    def on_time(self) -> bool:
        """Not later than its deadline, if it has one."""
        return self.request.deadline_us is None or self.at_us <= self.request.deadline_us


class PoolServer(Protocol):
    """Serves requests with workers that come and go."""

    done: list[ServedRequest]

    def until(self, at_us: int) -> None:
        """Lets everything happen that comes before."""

    def is_idle(self) -> bool:
        """Nothing is inside, and nothing comes any more."""

    def join(self, worker: str) -> None:
        """A worker is there."""

    def drain(self, worker: str) -> None:
        """It gets nothing new."""

    def leave(self, worker: str) -> bool:
        """It goes, unless something is left on it; whether it went."""

    def busy(self) -> set[str]:
        """Workers that have work."""

    def work(self, newcomers: Sequence[tuple[Request, int]]) -> PoolWork:
        """What the scaling signal asks for."""


class ScheduledServer:
    """The simulator's loop around the real scheduler."""

    def __init__(self, coming: Sequence[Arrived], first: Sequence[str], policy: str) -> None:
        csv = (ASSETS / "profiles" / PROFILE).read_text()
        cluster = ClusterSpec(workers=len(first)).completed(Profile.from_csv(csv))
        case = Case(cluster=cluster, profile_csv=csv, trace=(), settings=Settings(policy=policy))
        self.done: list[ServedRequest] = []
        self._loop = Loop(case, check=False, keep=False)
        self._requests = {a.request.id: a.request for a in coming}
        self._number = len(first)
        for arrived in coming:
            self._loop.add(arrived)

    def until(self, at_us: int) -> None:
        loop = self._loop
        while (next_us := loop.next_us()) is not None and next_us < at_us:
            loop.instant()
        loop.now_us = at_us
        ended = loop.result.ended[len(self.done) :]
        self.done += [ServedRequest(self._requests[e.request], e.at_us) for e in ended]

    def is_idle(self) -> bool:
        return len(self.done) == len(self._requests)

    def join(self, worker: str) -> None:
        host = f"host{self._number // A_HOST:03d}"
        self._number += 1
        self._happens("up", worker, host)

    def drain(self, worker: str) -> None:
        self._happens("drain", worker)

    def leave(self, worker: str) -> bool:
        if worker in self.busy() or self._loop.scheduler.latents_alone(worker):
            return False
        self._happens("lost", worker)
        return True

    def busy(self) -> set[str]:
        return {w.name for w in self._loop.scheduler.workers() if w.outstanding}

    def work(self, newcomers: Sequence[tuple[Request, int]]) -> PoolWork:
        kinds = {MODEL: (GPU,)}
        works = self._loop.scheduler.demand(newcomers, kinds, self._loop.now_us, BEST_EFFORT_US)
        return works.get((MODEL, GPU), PoolWork())

    def _happens(self, kind: str, worker: str, host: str = "host000") -> None:
        spec = {"at_us": self._loop.now_us, "kind": kind, "worker": worker, "host": host}
        self._loop.add(FaultSpec(**spec))  # type: ignore[arg-type]


@dataclass(slots=True)
class _Inside:
    request: Request
    arrived_us: int
    left_us: int
    served_us: int  # last

    def key(self, now_us: int) -> tuple[int, str]:
        """Earliest due first; whose deadline is lost is best effort."""
        deadline_us = self.request.deadline_us
        if deadline_us is None or now_us + self.left_us > deadline_us:
            return self.served_us + BEST_EFFORT_US, self.request.id
        return deadline_us, self.request.id


@dataclass(slots=True)
class QueueServer:
    """Earliest due first, preemptive, one worker a request."""

    coming: Sequence[Arrived]
    work_us: dict[int, int]  # by width
    workers: dict[str, bool]  # by name: whether it drains
    done: list[ServedRequest] = field(default_factory=list)
    _now_us: int = 0
    _next: int = 0
    _inside: list[_Inside] = field(default_factory=list)
    _on: dict[str, _Inside] = field(default_factory=dict)  # by worker, in the last quantum

    def until(self, at_us: int) -> None:
        while self._now_us < at_us:
            self._quantum()

    def is_idle(self) -> bool:
        return self._next == len(self.coming) and not self._inside

    def join(self, worker: str) -> None:
        self.workers[worker] = False

    def drain(self, worker: str) -> None:
        self.workers[worker] = True

    def leave(self, worker: str) -> bool:
        del self.workers[worker]  # between two quanta: another worker goes on from its latent
        return True

    def busy(self) -> set[str]:
        return set(self._on)

    def work(self, newcomers: Sequence[tuple[Request, int]]) -> PoolWork:
        found = PoolWork(workers=sum(not drains for drains in self.workers.values()))
        found.arrived = sum(count for _, count in newcomers)
        found.arrived_us = sum(self.work_us[r.shape.width] * n for r, n in newcomers)
        for each in self._inside:
            deadline_us = each.request.deadline_us
            due_us = each.served_us + BEST_EFFORT_US if deadline_us is None else deadline_us
            found.due.append((due_us - self._now_us, each.left_us))
            found.requests += 1
            if deadline_us is not None:
                found.with_deadline += 1
                found.late += self._now_us + each.left_us > deadline_us
        return found

    def _quantum(self) -> None:
        now_us, end_us = self._now_us, self._now_us + QUANTUM_US
        while self._next < len(self.coming) and self.coming[self._next].at_us <= now_us:
            arrived = self.coming[self._next]
            left_us = self.work_us[arrived.request.shape.width]
            self._inside.append(_Inside(arrived.request, arrived.at_us, left_us, arrived.at_us))
            self._next += 1
        self._inside.sort(key=lambda each: each.key(now_us))
        free = sorted(name for name, drains in self.workers.items() if not drains)
        self._on = dict(zip(free, self._inside, strict=False))
        for each in self._on.values():
            each.left_us -= QUANTUM_US
            each.served_us = end_us
            if each.left_us <= 0:
                self.done.append(ServedRequest(each.request, end_us + each.left_us))
        self._inside = [each for each in self._inside if each.left_us > 0]
        self._now_us = end_us
