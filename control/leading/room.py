"""What open promises may take of their stream: all but a last part, where ends and Fences fit.

A leader that could not store how requests ended would never have room again. The bytes are counted
down from what the broker said; it is asked again when they are used up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from hocket.clock import Clock
from hocket.errors import Refused

_HEADROOM = 0.05  # of the stream
_ENTRY_BYTES = 512  # that an entry takes beside its data, at most
_RETRY_US = 5_000_000
_ASK_EVERY_US = 50_000  # while there is none left


def no_room() -> Refused:
    """What a newcomer is told."""
    return Refused("QUEUE_FULL", "no room for another promise", _RETRY_US)


class StreamRoom:
    """The bytes that are left for open promises."""

    def __init__(self, ask: Callable[[], Awaitable[tuple[int, int] | None]], clock: Clock) -> None:
        """`ask` tells the bytes that are left of the stream, and its bound; None: it has none."""
        self._ask = ask
        self._clock = clock
        self._left: int | None = 0
        self._under_way = 0  # of promises that are not stored yet
        self._again_us = 0  # the broker is not asked before
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(
        self, size: int, forget_some: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[None]:
        """Room for so many bytes. `forget_some` makes more of it, if it can: says whether.

        Raises Refused.
        """
        size += _ENTRY_BYTES
        async with self._turn:
            await self._take(size, forget_some)
        self._under_way += size
        try:
            yield
        finally:
            self._under_way -= size

    async def _take(self, size: int, forget_some: Callable[[], Awaitable[bool]]) -> None:
        if self._left is not None and self._left < size and self._clock.now_us() >= self._again_us:
            await self._count()
        while self._left is not None and self._left < size:
            if not await forget_some():
                raise no_room()
            await self._count()
        if self._left is not None:
            self._left -= size

    async def _count(self) -> None:
        self._again_us = self._clock.now_us() + _ASK_EVERY_US
        told = await self._ask()
        self._left = None
        if told is not None:
            left, bound = told
            self._left = left - int(_HEADROOM * bound) - self._under_way
