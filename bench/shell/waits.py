"""How simulated processes wait: for a time, and for what comes to them."""

from __future__ import annotations

import asyncio

from .loop import SimulatedLoop


class Bell:
    """Wakes whoever waits for it to ring; an asyncio.Event without a memory, at a third of its
    cost. One looks at what one waits for, and then, without another await, waits.
    """

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._waiting: list[asyncio.Future[None]] = []

    def rung(self) -> asyncio.Future[None]:
        """To be awaited."""
        waiter = self._loop.create_future()
        self._waiting.append(waiter)
        return waiter

    def ring(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)


class SimulatedClock:
    """`hocket.clock.Clock` of one process: the loop's time, and an origin of its own."""

    def __init__(self, loop: SimulatedLoop, origin_us: int = 0) -> None:
        self._loop = loop
        self._origin_us = origin_us

    def now_us(self) -> int:
        return self._loop.now_us - self._origin_us

    async def sleep_until(self, at_us: int) -> None:
        while at_us > self.now_us():
            waiter: asyncio.Future[None] = self._loop.create_future()
            timer = self._loop.call_at((at_us + self._origin_us) / 1e6, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()

    async def settle(self) -> None:
        await asyncio.sleep(0)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
