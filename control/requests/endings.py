"""The ways of requests out: an ending is in the promises stream before anybody is told.

Beside the driver: a broker that stands still holds up what clients hear, not what workers do. The
queue is bounded by the open requests, each of which ends once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from control.requests.records import Record, Records, ending_event
from hocket.v1 import journal_pb2, mesh_pb2

_TOGETHER_MAX = 256  # appends under way


class PromiseLog(Protocol):
    """The promises stream, as far as a request's life needs it (see leading/promises.py)."""

    @property
    def term(self) -> int: ...

    async def append(self, promise: journal_pb2.Promise) -> int:
        """The broker's stamp in µs since 1970, once it is stored; waits while the broker is away.

        Raises Deposed when another leader owns the stream.
        """

    async def forget(self, request_id: str) -> None: ...

    async def drain(self, worker: str, draining: bool) -> None: ...


class Endings:
    """Journals each ending and then tells it."""

    def __init__(
        self, promises: PromiseLog, records: Records, tell: Callable[[mesh_pb2.RequestEvent], None]
    ) -> None:
        self._promises = promises
        self._records = records
        self._tell = tell
        self._queue: asyncio.Queue[tuple[Record, journal_pb2.EndedRequest]] = asyncio.Queue()
        self._awaited: dict[str, asyncio.Event] = {}  # by request

    @property
    def pending(self) -> int:
        return self._queue.qsize()

    def put(self, record: Record, ended: journal_pb2.EndedRequest) -> None:
        """`record` was taken with `Records.begin_end`: it comes here once."""
        self._queue.put_nowait((record, ended))

    async def over(self, record: Record) -> None:
        """Returns once an open request's ending is stored, so that it never runs again."""
        if record.is_open:
            await self._awaited.setdefault(record.id, asyncio.Event()).wait()

    async def run(self) -> None:
        """Works until cancelled."""
        slots = asyncio.Semaphore(_TOGETHER_MAX)
        async with asyncio.TaskGroup() as tasks:
            while True:
                record, ended = await self._queue.get()
                await slots.acquire()
                task = tasks.create_task(self._end(record, ended))
                task.add_done_callback(lambda _: slots.release())

    async def _end(self, record: Record, ended: journal_pb2.EndedRequest) -> None:
        unix_us = await self._promises.append(to_promise(record, self._promises.term, ended))
        self._tell(self._records.end(record.id, ending_event(ended), unix_us))
        awaited = self._awaited.pop(record.id, None)
        if awaited is not None:
            awaited.set()


def to_promise(
    record: Record, term: int, ended: journal_pb2.EndedRequest | None = None
) -> journal_pb2.Promise:
    """What is kept of a request that was promised before, or has ended."""
    promise = journal_pb2.Promise(
        term=term,
        submit=record.submit,
        answer=record.accepted,
        traceparent=record.traceparent,
        accepted_unix_us=record.accepted_unix_us,
        ended=ended,
        wish_sha256=record.wish,
    )
    if record.degraded is not None:
        promise.degraded.CopyFrom(record.degraded)
    return promise
