"""A simulated cluster with faults that the simulator's own cases do not have: workers that fail
whatever they are given, requests that fail wherever they run, devices that hang.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.sim.case import Case
from bench.sim.loop import Loop
from bench.sim.running import RunningAssignment
from bench.sim.workers import Fact, Workers
from control.scheduler.values import Outcome

from .driving import case

FAILS_AFTER_US = 5_000
Trouble = Callable[[str, str, int], bool]  # worker, request, now: whether it has it


def _none(worker: str, request: str, now_us: int) -> bool:
    return False


@dataclass(frozen=True)
class Failure:
    """One run that failed."""

    at_us: int
    worker: str
    request: str


class BadWorkers(Workers):
    """As simulated, but for the trouble."""

    def __init__(self, case: Case, fails: Trouble, hangs: Trouble) -> None:
        super().__init__(case.profile, case)
        self.failures: list[Failure] = []
        self.hung: list[RunningAssignment] = []
        self._fails, self._hangs = fails, hangs
        self._failing: list[tuple[int, int, RunningAssignment, str]] = []  # heap

    def _start(self, now_us: int, running: RunningAssignment) -> None:
        a = running.assignment
        for worker in a.workers:
            for member in a.batch:
                if self._hangs(worker, member.request, now_us):
                    running.started = True
                    self.hung.append(running)
                    return
                if self._fails(worker, member.request, now_us):
                    running.started = True
                    self.failures.append(Failure(now_us, worker, member.request))
                    failing = (now_us + FAILS_AFTER_US, a.sequence, running, worker)
                    heapq.heappush(self._failing, failing)
                    return
        super()._start(now_us, running)

    def next_us(self) -> int | None:
        while self._failing and self._failing[0][2].over:
            heapq.heappop(self._failing)
        times = [super().next_us(), self._failing[0][0] if self._failing else None]
        return min((t for t in times if t is not None), default=None)

    def ended(self, now_us: int) -> list[Fact]:
        facts = super().ended(now_us)
        while self._failing and self._failing[0][0] <= now_us:
            _, _, running, worker = heapq.heappop(self._failing)
            if not running.over:
                self._drop(running)
                facts.append(self._failure(now_us, running.assignment, worker, "MODEL_ERROR", ()))
        return facts


class Cluster:
    """Requests of one size at random times on a cluster with trouble."""

    def __init__(
        self,
        policy: str,
        *,
        fails: Trouble = _none,
        hangs: Trouble = _none,
        requests: int = 60,
        every_us: int = 130_000,
        workers: int = 8,
        steps: int = 16,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        draw, at_us, rows = random.Random(seed), 0, []
        for _ in range(requests):
            at_us += int(draw.expovariate(1 / every_us))
            rows.append((at_us, 512, 60_000_000))
        one = case(rows, steps=steps, workers=workers, policy=policy, **settings)
        self.loop = Loop(one, check=False)
        self.workers = BadWorkers(one, fails, hangs)
        self.loop._workers = self.workers

    def run(self) -> None:
        self.loop.run()

    @property
    def failed(self) -> set[str]:
        """Requests that ended badly."""
        return {e.request for e in self.loop.result.ended if e.outcome is not Outcome.DONE}
