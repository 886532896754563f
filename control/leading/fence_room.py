"""Room for the Fences of a new leader, in a stream that is full to the last byte.

A stream is that full where an older version filled it, which kept nothing back, or where its bound
was made smaller than what it holds. What ended first is forgotten; what is open stays, and where
there is nothing else the operator is told what helps.
"""

from __future__ import annotations

import asyncio
import logging

from control.leading.standby import Book
from hocket.clock import Clock
from hocket.errors import BrokerUnavailable
from hocket.messaging.bus import Subjects
from hocket.messaging.stores import Log, LogFull

log = logging.getLogger(__name__)

_ENTRY_BYTES = 512  # that a Fence takes at most
_TOGETHER = 32  # requests forgotten between two looks at the room
_AGAIN_US = 200_000
_LOOK_EVERY_US = 5_000_000  # the whole stream is read for it
_TELL_EVERY_US = 10_000_000


class FenceRoom:
    """Makes it for one leader that takes the stream over."""

    def __init__(self, stream: Log, subjects: Subjects, clock: Clock, fences: int) -> None:
        self._log = stream
        self._subjects = subjects
        self._clock = clock
        self._need = fences * _ENTRY_BYTES
        self._tell_us = 0
        self._look_us = 0  # no sooner: nothing had ended

    async def make(self, full: LogFull) -> None:
        """Returns when it is time for another try."""
        try:
            if self._clock.now_us() >= self._look_us:
                if await self._forget_ended(full):
                    return
                self._look_us = self._clock.now_us() + _LOOK_EVERY_US
            if self._clock.now_us() >= self._tell_us:
                self._tell_us = self._clock.now_us() + _TELL_EVERY_US
                told = "of open requests: nobody can lead; a larger promises_bytes_max helps"
                log.warning("%s, %s", full, told)
        except BrokerUnavailable as error:
            log.debug("no room was made in the promises stream: %s", error)
        await self._clock.sleep_until(self._clock.now_us() + _AGAIN_US)

    async def _forget_ended(self, full: LogFull) -> bool:
        """Whether there was anything to forget. Raises BrokerUnavailable."""
        book = Book(self._subjects)
        async for entry in self._log.read(self._subjects.promises):
            book.take(entry)
        ended, count = list(book.ended), 0
        while count < len(ended) and await self._lacks():
            some = ended[count : count + _TOGETHER]
            await asyncio.gather(*(self._log.purge(self._subjects.promise(r)) for r in some))
            count += len(some)
        if count:
            log.warning("%s: the oldest %d ended requests were forgotten for a leader", full, count)
        return count > 0

    async def _lacks(self) -> bool:
        told = await self._log.room_and_bound()
        return told is not None and told[0] < self._need
