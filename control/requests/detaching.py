"""Requests that live by themselves from now on: a later call with their key wants that.

Whoever creates an operation is told of it once it is durable that nobody has to follow it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from control.requests import refusals
from control.requests.endings import PromiseLog, to_promise
from control.requests.records import Record, Records
from hocket.errors import Refused
from hocket.messaging.stores import EntryTooLarge
from hocket.v1 import types_pb2

Stored = Callable[[types_pb2.Failure | None], None]

_WAITING_MAX = 4_096


class Detaching:
    """Promises again, as detached, what was promised to a caller that may leave."""

    def __init__(self, promises: PromiseLog, records: Records) -> None:
        self._promises = promises
        self._records = records
        self._queue: asyncio.Queue[tuple[Record, Stored]] = asyncio.Queue(_WAITING_MAX)

    @property
    def is_full(self) -> bool:
        return self._queue.full()

    def put(self, record: Record, stored: Stored) -> None:
        """Of an open request; `stored` is called once, with what was in the way."""
        self._records.detach(record)
        self._queue.put_nowait((record, stored))

    async def run(self) -> NoReturn:
        """Works until cancelled. Raises Deposed."""
        while True:
            record, stored = await self._queue.get()
            failure = None
            if not record.ending and record.is_open:  # its end says it all
                try:
                    await self._promises.append(to_promise(record, self._promises.term))
                except (Refused, EntryTooLarge) as full:
                    failure = refusals.of(full)
            stored(failure)
