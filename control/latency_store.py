"""Where the latency model outlives its process: one value in a NATS KV bucket.

Written at most every few seconds while something was learned, and at a clean stop; read by the next
leader before its first fact. What it reads goes into its diary, so that a replay starts from the
same. Compressed, since what is learned of many families is longer than a message may be. Content of
another version, or damaged, is left out with a warning: the model then begins with its profile, as
on the first day. No trouble here ends a leader.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from control.scheduler.core import Scheduler
from control.scheduler.times.cells import LatencySnapshot
from hocket.clock import Clock
from hocket.errors import BrokerUnavailable
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import EntryTooLarge, LeasedKey, LogFull, NoRoom, OutcomeUnknown

log = logging.getLogger(__name__)
T = TypeVar("T")

VERSION = 1
SAVE_EVERY_US = 2_000_000
LATENCIES = "latencies"  # the key


class StoredSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What the bucket holds."""

    version: int
    snapshot: LatencySnapshot


class Ask(Protocol):
    """Puts a question to the scheduler where it runs (see `Driver.ask`)."""

    async def __call__(self, question: Callable[[Scheduler], T]) -> T: ...


class LatencyStore:
    """Keeps one scheduler's latencies."""

    def __init__(self, cell: LeasedKey) -> None:
        self._cell = cell
        self._saved = 0  # the scheduler's count of what it learned, at the last write
        self._failing = False
        self._saving = asyncio.Lock()

    @classmethod
    async def open(cls, bus: Bus, subjects: Subjects, replicas: int = 1) -> LatencyStore:
        """Makes the bucket where needed."""
        try:
            cell = await LeasedKey.open(bus, subjects.latency_bucket, LATENCIES, replicas=replicas)
        except (BrokerUnavailable, NoRoom) as error:
            log.warning("latencies are not kept: %s", error)
            cell = LeasedKey(bus, subjects.latency_bucket, LATENCIES)
        return cls(cell)

    async def load(self) -> LatencySnapshot | None:
        """What an earlier leader had learned; None where there is nothing that can be read."""
        try:
            found = await self._cell.get()
        except BrokerUnavailable as error:
            log.warning("what an earlier leader had learned cannot be had: %s", error)
            return None
        if found is None:
            return None
        try:
            content = unpacked(found[0])
            version = msgspec.json.decode(content, type=_Versioned).version
            if version == VERSION:
                return msgspec.json.decode(content, type=StoredSnapshot).snapshot
            problem = f"version {version}, this is {VERSION}"
        except (msgspec.MsgspecError, zlib.error) as error:
            problem = str(error)
        log.warning("what an earlier leader had learned of latencies is left out: %s", problem)
        return None

    async def save(self, scheduler: Scheduler) -> None:
        """Writes what is new of a scheduler that is at rest."""
        await self._save(self._news(scheduler))

    async def keep(self, ask: Ask, clock: Clock) -> None:
        """Writes what is new every few seconds, until cancelled; `ask` has the scheduler."""
        while True:
            await clock.sleep_until(clock.now_us() + SAVE_EVERY_US)
            await self._save(await ask(self._news))

    def _news(self, scheduler: Scheduler) -> tuple[int, LatencySnapshot] | None:
        if scheduler.learned == self._saved:
            return None
        return scheduler.learned, scheduler.latencies()

    async def _save(self, news: tuple[int, LatencySnapshot] | None) -> None:
        """A broker that does not answer is tried again the next time."""
        if news is None:
            return
        learned, snapshot = news
        content = await asyncio.to_thread(
            packed, StoredSnapshot(version=VERSION, snapshot=snapshot)
        )
        async with self._saving:
            try:
                await self._write(content)
            except (BrokerUnavailable, OutcomeUnknown, LogFull, EntryTooLarge) as error:
                if not self._failing:
                    log.warning("latencies were not stored: %s", error)
                self._failing = True
                return
            self._saved, self._failing = learned, False

    async def _write(self, content: bytes) -> None:
        found = await self._cell.get()
        if found is None:
            await self._cell.create(content)
        else:  # where another leader has written meanwhile, its model is the newer one
            await self._cell.update(content, found[1])


def packed(stored: StoredSnapshot) -> bytes:
    """As the bucket holds it."""
    return zlib.compress(msgspec.json.encode(stored))


def unpacked(content: bytes) -> bytes:
    """The JSON; older versions did not compress it. Raises zlib.error."""
    return content if content.startswith(b"{") else zlib.decompress(content)


class _Versioned(msgspec.Struct):
    version: int
