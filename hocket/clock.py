"""The one place that reads a clock.

Everything else gets a `Clock` handed in and works in integer microseconds, so that a test can put a
whole service on a `ManualClock`. The origin of `now_us` is arbitrary per process: clocks of two
processes are never compared.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time and a way to wait for it."""

    def now_us(self) -> int:
        """Microseconds since an arbitrary origin, never going back."""

    async def sleep_until(self, at_us: int) -> None:
        """Returns once `now_us() >= at_us`."""

    async def settle(self) -> None:
        """Returns when whatever belongs to this instant has had a chance to happen."""


class SystemClock:
    """The machine's monotonic clock."""

    def now_us(self) -> int:
        return time.monotonic_ns() // 1000

    async def sleep_until(self, at_us: int) -> None:
        while (left_us := at_us - self.now_us()) > 0:  # noqa: ASYNC110  this is the clock
            await asyncio.sleep(left_us / 1e6)

    async def settle(self) -> None:
        await asyncio.sleep(0)


class ManualClock:
    """A clock that stands still until somebody moves it. For tests and for replays."""

    def __init__(self, now_us: int = 0) -> None:
        self._now_us = now_us
        self._order = itertools.count()
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._settling: list[asyncio.Future[None]] = []

    def now_us(self) -> int:
        return self._now_us

    async def sleep_until(self, at_us: int) -> None:
        if at_us <= self._now_us:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (at_us, next(self._order), waiter))
        await waiter

    async def settle(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settling.append(waiter)
        await waiter

    def settled(self) -> bool:
        """Lets those go on who wait in `settle`; False when nobody does."""
        waiters, self._settling = self._settling, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        return bool(waiters)

    def next_wake_us(self) -> int | None:
        """When the earliest sleeper wants to wake; None when nobody sleeps."""
        while self._sleepers and self._sleepers[0][2].done():
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] if self._sleepers else None

    def advance_to(self, at_us: int) -> None:
        """Moves time on and wakes whoever waited for it, earliest first."""
        if at_us < self._now_us:
            raise ValueError(f"time does not go back: {at_us} < {self._now_us}")
        self._now_us = at_us
        while self._sleepers and self._sleepers[0][0] <= at_us:
            waiter = heapq.heappop(self._sleepers)[2]
            if not waiter.done():
                waiter.set_result(None)


def unix_ns() -> int:
    """Wall-clock nanoseconds since 1970, for logs and span times only; never for a decision."""
    return time.time_ns()


def steady_ns() -> int:
    """Nanoseconds of a clock that never goes back; for measuring durations inside one process."""
    return time.perf_counter_ns()


def thread_cpu_ns() -> int:
    """Processor time of the calling thread: for measuring on a machine that does other work too."""
    return time.thread_time_ns()
