"""A bounded queue between what comes from the broker and who takes it."""

from __future__ import annotations

import asyncio
from collections import deque
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
        assert limit > 0, "a feed has a bound"
        self._limit = limit
        self._items: deque[T] = deque()
        self._takers: deque[asyncio.Future[None]] = deque()  # each is woken by one item …
        self._givers: deque[asyncio.Future[None]] = deque()  # … and by room for one
        self._error: Exception | None = None
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
        if len(self._items) >= self._limit:
            self._items.popleft()
            self.drops += 1
        self._items.append(item)
        _wake(self._takers)

    async def offer(self, item: T) -> None:
        """Takes an item once there is room."""
        while len(self._items) >= self._limit:
            await _turn(self._givers)
        self._items.append(item)
        _wake(self._takers)

    async def next(self) -> T:
        """The next item, once there is one; raises what the feed was ended with behind the last."""
        while not self._items:
            if self._error is not None:
                raise self._error
            await _turn(self._takers)
        item = self._items.popleft()
        _wake(self._givers)
        return item

    def end(self, error: Exception) -> None:
        """Nothing more will come: whoever waits, or asks later, gets the error."""
        self._error = error
        while self._takers:
            _wake(self._takers)

    @property
    def pending(self) -> int:
        """Items that have come and were not taken yet."""
        return len(self._items)

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


async def _turn(waiting: deque[asyncio.Future[None]]) -> None:
    """Waits to be woken. Woken and cancelled at once, it wakes the next one in its place."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting.append(waiter)
    try:
        await waiter
    except asyncio.CancelledError:
        if not waiter.cancelled():
            _wake(waiting)
        elif waiter in waiting:
            waiting.remove(waiter)
        raise


def _wake(waiting: deque[asyncio.Future[None]]) -> None:
    while waiting:
        waiter = waiting.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return
