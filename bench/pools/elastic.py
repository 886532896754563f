"""One day of a pool that follows a rule: workers come late and leave well.

    rule ── wanted, every 15 s ──▶ more: a worker is there `start_s` later, its weights loaded
                                   fewer: those that start first, then the idle, then the youngest;
                                          they are drained, and go when nothing is left on them

A worker costs from the moment that it is asked for until it is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bench.pools.rules import PoolMoment, PoolRule
from bench.pools.served import PoolServer
from control.scaling.pools import Outcomes
from control.scheduler.values import Arrived, Request

TICK_US = 1_000_000
FOLLOW_TICKS = 15  # Kubernetes' autoscaler looks so often


@dataclass(frozen=True, slots=True)
class PoolRun:
    """What a day came to."""

    requests: int
    attainment: float  # of the requests with a deadline
    best_effort_p95_s: float
    worker_hours: float
    mean_workers: float
    most_workers: int


@dataclass(slots=True)
class _Paid:
    """A worker, from when it was asked for."""

    since_us: int
    ready_us: int
    joined: bool = False
    draining: bool = False


class ElasticPool:
    """A run of one seed under one rule."""

    def __init__(
        self,
        coming: Sequence[Arrived],
        server: PoolServer,
        rule: PoolRule,
        first: Sequence[str],
        start_s: float,
    ) -> None:
        """`first` are workers that are there at the beginning."""
        self._coming, self._server, self._rule = coming, server, rule
        self._start_us = round(start_s * 1e6)
        self._workers = {name: _Paid(0, 0, joined=True) for name in first}
        self._named = self._most = len(first)
        self._paid_us = 0
        self._next = self._told = 0  # of `_coming` and what is done: not told to the rule yet

    def run(self, length_s: float) -> PoolRun:
        """The whole day, and until its last request is done; only the day is paid for."""
        end_tick, tick, paid_us = round(length_s * 1e6) // TICK_US, 0, 0
        while tick < end_tick or not self._server.is_idle():
            tick += 1
            self._server.until(tick * TICK_US)
            self._step(tick)
            if tick == end_tick:
                paid_us = self._paid_until(tick * TICK_US)
        arrived_us = {a.request.id: a.at_us for a in self._coming}
        done = self._server.done
        dated = [d.on_time for d in done if d.request.deadline_us is not None]
        waits = sorted(
            d.at_us - arrived_us[d.request.id] for d in done if d.request.deadline_us is None
        )
        return PoolRun(
            requests=len(done),
            attainment=sum(dated) / max(1, len(dated)),
            best_effort_p95_s=waits[int(0.95 * len(waits))] / 1e6 if waits else 0.0,
            worker_hours=paid_us / 3.6e9,
            mean_workers=paid_us / (end_tick * TICK_US),
            most_workers=self._most,
        )

    def _step(self, tick: int) -> None:
        now_us, server = tick * TICK_US, self._server
        for name, paid in list(self._workers.items()):
            if not paid.joined and paid.ready_us <= now_us:
                paid.joined = True
                server.join(name)
            if paid.draining and server.leave(name):
                self._paid_us += now_us - self._workers.pop(name).since_us
        busy = server.busy()
        staying = {n: paid for n, paid in self._workers.items() if not paid.draining}
        wanted = self._rule.wanted(
            PoolMoment(
                now_us=now_us,
                work=server.work(self._newcomers(now_us)),
                outcomes=self._outcomes(),
                workers=len(staying),
                busy=len(busy & staying.keys()),
            )
        )
        if tick % FOLLOW_TICKS == 0:
            self._follow(wanted, staying, busy, now_us)

    def _follow(self, wanted: int, staying: dict[str, _Paid], busy: set[str], now_us: int) -> None:
        for _ in range(wanted - len(staying)):
            self._workers[f"w{self._named:04d}"] = _Paid(now_us, now_us + self._start_us)
            self._named += 1
        self._most = max(self._most, len(self._workers))
        leaving = sorted(
            staying, key=lambda n: (staying[n].joined, n in busy, -staying[n].since_us)
        )
        for name in leaving[: max(0, len(staying) - wanted)]:
            if staying[name].joined:
                staying[name].draining = True
                self._server.drain(name)
            else:
                self._paid_us += now_us - self._workers.pop(name).since_us

    def _paid_until(self, now_us: int) -> int:
        return self._paid_us + sum(now_us - paid.since_us for paid in self._workers.values())

    def _newcomers(self, now_us: int) -> list[tuple[Request, int]]:
        counts: Counter[Request] = Counter()
        while self._next < len(self._coming) and self._coming[self._next].at_us < now_us:
            request = self._coming[self._next].request
            counts[msgspec.structs.replace(request, id="", deadline_us=None)] += 1
            self._next += 1
        return list(counts.items())

    def _outcomes(self) -> Outcomes:
        new = self._server.done[self._told :]
        self._told += len(new)
        dated = [d.on_time for d in new if d.request.deadline_us is not None]
        return Outcomes(len(dated), dated.count(False))
