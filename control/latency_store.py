"""Where the latency model outlives its process: one value in a NATS KV bucket.

Written at most every few seconds while something was learned, and at a clean stop; read by the next
leader before its first fact. What it reads goes into its journal entry, so that a replay starts
from the same. Content of another version, or damaged, is left out with a warning: the model then
begins with its profile, as on the first day.
"""

from __future__ import annotations

import logging

import msgspec
import nats.errors
from nats.js.errors import NotFoundError
from nats.js.kv import KeyValue

from control.scheduler.cells import LatencySnapshot
from control.scheduler.core import Scheduler
from hocket.bus import Bus, Subjects
from hocket.clock import Clock

log = logging.getLogger(__name__)

VERSION = 1
SAVE_EVERY_US = 2_000_000
_KEY = "latencies"


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the bucket holds."""

    version: int
    snapshot: LatencySnapshot


class LatencyStore:
    """Keeps one scheduler's latencies."""

    def __init__(self, store: KeyValue) -> None:
        self._store = store
        self._saved = 0  # the scheduler's count of what it learned, at the last write

    @classmethod
    async def open(cls, bus: Bus, subjects: Subjects) -> LatencyStore:
        """Creates the bucket where needed."""
        return cls(await bus.jetstream.create_key_value(bucket=subjects.latency_bucket))

    async def load(self) -> LatencySnapshot | None:
        """What an earlier leader had learned; None where there is nothing that can be read."""
        try:
            content = (await self._store.get(_KEY)).value or b""
        except NotFoundError:
            return None
        try:
            version = msgspec.json.decode(content, type=_Versioned).version
            if version == VERSION:
                return msgspec.json.decode(content, type=Stored).snapshot
            problem = f"version {version}, this is {VERSION}"
        except msgspec.MsgspecError as error:
            problem = str(error)
        log.warning("what an earlier leader had learned of latencies is left out: %s", problem)
        return None

    async def save(self, scheduler: Scheduler) -> None:
        """Writes what is new; a broker that does not answer is tried again the next time."""
        learned = scheduler.learned
        if learned == self._saved:
            return
        content = msgspec.json.encode(Stored(version=VERSION, snapshot=scheduler.latencies()))
        try:
            await self._store.put(_KEY, content)
        except (nats.errors.Error, OSError) as error:
            log.warning("latencies were not stored: %s", str(error) or "no answer")
            return
        self._saved = learned

    async def keep(self, scheduler: Scheduler, clock: Clock) -> None:
        """Writes every few seconds, until cancelled."""
        while True:
            await clock.sleep_until(clock.now_us() + SAVE_EVERY_US)
            await self.save(scheduler)


class _Versioned(msgspec.Struct):
    version: int
