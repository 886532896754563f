"""A bounded queue between what comes from the broker and who takes it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Generic, TypeVar

import nats.errors
from nats.aio.subscription import Subscription

T = TypeVar("T")


class Feed(Generic[T]):
    """What comes, behind a bounded queue.

    `put` never waits: when the queue is full the oldest item gives way and is counted, since the
    last one says how it ended. `offer` waits for room: nothing is lost.
    """

    def __init__(self, limit: int) -> None:
        self._queue: asyncio.Queue[T] = asyncio.Queue(limit)
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self.drops = 0

    def attach(self, source: Subscription | asyncio.Task[None]) -> None:
        """Names what fills this feed; it ends when the feed is closed."""
        if isinstance(source, asyncio.Task):
            self._task = source
        else:
            self._subscription = source

    def put(self, item: T) -> None:
        """Takes an item at once, at the oldest one's cost where there is no room."""
        if self._queue.full():
            self._queue.get_nowait()
            self.drops += 1
        self._queue.put_nowait(item)

    async def offer(self, item: T) -> None:
        """Takes an item once there is room."""
        await self._queue.put(item)

    async def next(self) -> T:
        """The next item, once there is one."""
        return await self._queue.get()

    @property
    def pending(self) -> int:
        """Items that have come and were not taken yet."""
        return self._queue.qsize()

    async def close(self) -> None:
        """Ends what fills this feed. Closing twice is no error."""
        subscription, self._subscription = self._subscription, None
        task, self._task = self._task, None
        if subscription is not None:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
