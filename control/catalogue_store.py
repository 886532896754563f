"""Where the list of models outlives its leader: one value beside the latencies (latency_store.py).

Written a few seconds after a change, read by the next leader before its first answer. No trouble
here ends a leader: then a model without workers is unknown until one serves it again.
"""

from __future__ import annotations

import logging
from typing import NoReturn

from google.protobuf.message import DecodeError

from control.scaling.seen_models import ModelsSeen
from hocket.clock import Clock
from hocket.errors import BrokerUnavailable
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import EntryTooLarge, LeasedKey, LogFull, OutcomeUnknown
from hocket.v1 import control_pb2

log = logging.getLogger(__name__)

SAVE_EVERY_US = 2_000_000
MODELS = "models"  # the key


class CatalogueStore:
    """Keeps one leader's catalogue. The bucket is the latency store's, and made by it."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._cell = LeasedKey(bus, subjects.latency_bucket, MODELS)
        self._saved = 0  # the catalogue's count of changes, at the last write
        self._failing = False

    async def load(self, catalogue: ModelsSeen, unix_us: int) -> None:
        """Adds what an earlier leader knew; it is `unix_us` by the broker's clock."""
        try:
            found = await self._cell.get()
            if found is not None:
                kept = control_pb2.SeenModels.FromString(found[0])
                catalogue.restore(kept, unix_us)
        except (BrokerUnavailable, DecodeError) as error:
            log.warning("models that an earlier leader knew cannot be had: %s", error)

    async def keep(self, catalogue: ModelsSeen, clock: Clock) -> NoReturn:
        """Writes what is new every few seconds, until cancelled."""
        while True:
            await clock.sleep_until(clock.now_us() + SAVE_EVERY_US)
            await self.save(catalogue)

    async def save(self, catalogue: ModelsSeen) -> None:
        """Writes what is new; a broker that does not answer is tried again the next time."""
        changes, content = catalogue.changes, catalogue.stored().SerializeToString()
        if changes == self._saved:
            return
        try:
            found = await self._cell.get()
            if found is None:
                await self._cell.create(content)
            else:
                await self._cell.update(content, found[1])
        except (BrokerUnavailable, OutcomeUnknown, LogFull, EntryTooLarge) as error:
            if not self._failing:
                log.warning("the list of models was not stored: %s", error)
            self._failing = True
            return
        self._saved, self._failing = changes, False
