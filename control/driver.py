"""The live driver: shows the scheduler every fact, once, in order, and carries its plans to the
workers.

    facts (reports, arrivals, leases) ──▶ inbox ──▶ observe … observe ──▶ due? round near? ──▶ plan
    ──▶ publish

It decides nothing: when to plan is the scheduler's own answer (`due`, `wake_us`), and the simulator
asks it the same way. Facts are stamped when they enter the inbox, and everything that waits there
is observed before a plan is asked for, so that a fact stamped at a boundary belongs to the next
round.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Literal, Protocol

from control.scheduler import values
from control.scheduler.core import Scheduler
from control.scheduler.facts import in_order
from hocket.clock import Clock


class Outlet(Protocol):
    """Where the driver's results go (see publisher.py)."""

    async def observed(self, event: values.Event) -> None:
        """A fact was shown to the scheduler."""

    async def ended(self, ended: values.Ended) -> None:
        """A request ended."""

    async def planned(self, plan: values.Plan, plan_time_us: int) -> None:
        """A plan was made: journal it and tell the workers. Whom it turned away has ended."""


class Driver:
    """Owns the scheduler. Everything runs on one event loop; nothing here blocks it."""

    def __init__(self, scheduler: Scheduler, clock: Clock, outlet: Outlet) -> None:
        self.scheduler = scheduler
        self._clock = clock
        self._outlet = outlet
        self._inbox: deque[values.Event] = deque()
        self._arrived = asyncio.Event()

    def post(self, event: values.Event) -> None:
        """Queues a fact whose `at_us` came from `stamp` in this same step of the event loop."""
        self._inbox.append(event)
        self._arrived.set()

    def stamp(self) -> int:
        """Time for a fact that arrives now."""
        return self._clock.now_us()

    async def run(self) -> None:
        """Drives until cancelled."""
        while True:
            facts = await self._next_facts()
            await self._turn(facts)

    async def _turn(self, facts: Sequence[values.Event]) -> None:
        for fact in facts:
            for ended in self.scheduler.observe(fact):
                await self._outlet.ended(ended)
            await self._outlet.observed(fact)
        now_us = self._clock.now_us()
        wake_us = self.scheduler.wake_us()
        if self.scheduler.due(now_us) or (wake_us is not None and wake_us <= now_us):
            plan = self.scheduler.plan(now_us)
            await self._outlet.planned(plan, self._clock.now_us() - now_us)
            for ended in plan.ended:
                await self._outlet.ended(ended)

    async def _next_facts(self) -> list[values.Event]:
        """All facts that wait, or none when the time for a plan comes first."""
        if not self._inbox:
            self._arrived.clear()
            await self._wait()
        await self._clock.settle()
        facts = in_order(self._inbox)
        self._inbox.clear()
        return facts

    async def _wait(self) -> None:
        wake_us = self.scheduler.wake_us()
        waits = [asyncio.ensure_future(self._arrived.wait())]
        if wake_us is not None:
            waits.append(asyncio.ensure_future(self._wake_at(wake_us)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _wake_at(self, at_us: int) -> Literal[True]:
        await self._clock.sleep_until(at_us)
        return True
