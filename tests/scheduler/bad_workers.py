"""A simulated cluster with faults that the simulator's own cases do not have: workers that fail
whatever they are given, requests that fail wherever they run, devices that hang.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from bench.sim.case import Case
from bench.sim.loop import Loop
from bench.sim.running import Running
from bench.sim.workers import Workers

FAILS_AFTER_US = 5_000


@dataclass
class Trouble:
    """Which runs fail fast, and which hang for ever: by worker, request and time."""

    fails: Callable[[str, str, int], bool] = lambda worker, request, now_us: False
    hangs: Callable[[str, str, int], bool] = lambda worker, request, now_us: False


class BadWorkers(Workers):
    """As simulated, but for the trouble."""

    trouble: Trouble
    failures: list[tuple[int, str, str]]  # when, worker, request
    hung: list[Running]

    def _start(self, now_us: int, running: Running) -> None:
        a = running.assignment
        for worker in a.workers:
            for member in a.batch:
                if self.trouble.hangs(worker, member.request, now_us):
                    running.started = True
                    self.hung.append(running)
                    return
                if self.trouble.fails(worker, member.request, now_us):
                    at_us = now_us + FAILS_AFTER_US
                    self.failures.append((now_us, worker, member.request))
                    running.started = True
                    heapq.heappush(self.failing, (at_us, a.sequence, running, worker))
                    return
        super()._start(now_us, running)

    def next_us(self) -> int | None:
        while self.failing and self.failing[0][2].over:
            heapq.heappop(self.failing)
        times = [super().next_us(), self.failing[0][0] if self.failing else None]
        return min((t for t in times if t is not None), default=None)

    def ended(self, now_us: int) -> list:
        facts = list(super().ended(now_us))
        while self.failing and self.failing[0][0] <= now_us:
            _, _, running, worker = heapq.heappop(self.failing)
            if not running.over:
                self._drop(running)
                facts.append(self._failure(now_us, running.assignment, worker, "MODEL_ERROR", ()))
        return facts


def troubled(case: Case, trouble: Trouble) -> Loop:
    """A loop over a case, with trouble."""
    loop = Loop(case, check=False)
    workers = BadWorkers(case.profile, case, None)
    workers.trouble, workers.failures, workers.hung, workers.failing = trouble, [], [], []
    loop._workers = workers
    return loop
