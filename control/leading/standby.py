"""What a replica does while another one leads: it keeps what a leader has to know.

It follows the promises stream and hears the workers' heartbeats, so that it can lead at once. The
`Book` is the stream's state as of one entry; a leader's recovery reads nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from hocket.errors import BrokerUnavailable
from hocket.messaging.bus import Subjects
from hocket.messaging.deliveries import StreamEntry
from hocket.messaging.stores import Log
from hocket.messaging.subjects import name_of
from hocket.v1 import journal_pb2

log = logging.getLogger(__name__)

_CATCH_UP_S = 3.0  # then the stream is read anew
_AGAIN_S = 0.2
_MARKS_MAX = 20_000


@dataclass(frozen=True)
class Kept:
    """The state of one request, and when the broker stored it."""

    promise: journal_pb2.Promise
    unix_us: int


class Book:
    """The promises stream's state, entry by entry."""

    def __init__(self, subjects: Subjects) -> None:
        self._requests = subjects.promise("").removesuffix("~")
        self._wishes = subjects.drain("").removesuffix("~")
        self._fence = subjects.fence("")
        self._marks: dict[str, None] = {}  # newest subjects that say that something is gone
        self._fences: set[str] = set()
        self.open: dict[str, Kept] = {}
        self.ended: OrderedDict[str, Kept] = OrderedDict()  # by when they ended
        self.draining: set[str] = set()  # workers
        self.seen = 0  # number of the newest entry

    def __len__(self) -> int:
        """Entries that a stream of this state has."""
        open_and_ended = len(self.open) + len(self.ended)
        return open_and_ended + len(self.draining) + len(self._marks) + len(self._fences)

    def take(self, entry: StreamEntry) -> None:
        """The next entry; one that cannot be read is left out."""
        try:
            self._take(entry)
        except (DecodeError, ValueError) as error:
            log.warning("an entry of the promises stream is left out: %s: %s", entry.subject, error)
        self.seen = entry.sequence

    def _take(self, entry: StreamEntry) -> None:
        self._marks.pop(entry.subject, None)
        if entry.subject.startswith(self._fence):
            self._fences.add(entry.subject)
        elif entry.subject.startswith(self._wishes):
            wish = journal_pb2.DrainWish.FromString(entry.data)
            if wish.draining:
                self.draining.add(wish.worker)
            else:
                self.draining.discard(wish.worker)
                self._marks[entry.subject] = None
        elif entry.subject.startswith(self._requests):
            request = name_of(entry.subject.removeprefix(self._requests))
            promise = journal_pb2.Promise.FromString(entry.data)
            self.open.pop(request, None)
            self.ended.pop(request, None)
            if promise.HasField("ended"):
                self.ended[request] = Kept(promise, entry.unix_us)
            elif promise.HasField("submit"):
                self.open[request] = Kept(promise, entry.unix_us)
            else:
                self._marks[entry.subject] = None
        if len(self._marks) > _MARKS_MAX:
            del self._marks[next(iter(self._marks))]

    def prune(self, unix_us: int, retention_us: int, ended_max: int) -> None:
        """Leaves out what the stream does not keep for longer."""
        while self.ended:
            request, kept = next(iter(self.ended.items()))
            if len(self.ended) <= ended_max and kept.unix_us + retention_us > unix_us:
                return
            del self.ended[request]


class Standby:
    """Keeps a book."""

    def __init__(self, stream: Log, subjects: Subjects) -> None:
        self._log = stream
        self._subjects = subjects
        self._book = Book(subjects)
        self._came = asyncio.Event()

    async def run(self) -> None:
        """Follows the stream until cancelled."""
        self._book = book = Book(self._subjects)
        feed = await self._log.follow(0)
        try:
            while True:
                entry = await feed.next()
                if entry.sequence <= book.seen:
                    self._book = book = Book(self._subjects)  # the broker lost its store
                book.take(entry)
                self._came.set()
        finally:
            await feed.close()

    async def complete(self, upto: int) -> Book:
        """The book once it has entry number `upto`. What does not add up is read anew."""
        try:
            async with asyncio.timeout(_CATCH_UP_S):
                while self._book.seen < upto:
                    self._came.clear()
                    await self._came.wait()
            if await self._log.count() <= len(self._book):  # what expired is in the book still
                return self._book
        except (TimeoutError, BrokerUnavailable) as error:
            log.info("the promises stream is read anew: %s", str(error) or "it lags")
        while True:
            book = Book(self._subjects)
            try:
                async for entry in self._log.read(self._subjects.promises):
                    book.take(entry)
            except BrokerUnavailable:
                await asyncio.sleep(_AGAIN_S)
                continue
            return book
