"""Who leads the control plane: a key on the broker that expires when its holder falls silent."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import msgspec

from hocket.errors import BrokerUnavailable
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.feed import Feed
from hocket.messaging.stores import LeasedKey

log = logging.getLogger(__name__)

LEADER_KEY = "leader"
_ASK_EVERY_S = 0.2


class LeaderKey(msgspec.Struct, frozen=True, kw_only=True):
    """What the key holds."""

    address: str  # "host:port" of the leader's door; empty: it has resigned
    term: int = 0  # 0: it has only just won, and does not serve yet
    incarnation: str = ""  # the process


def read_key(value: bytes | None) -> LeaderKey | None:
    """None where nobody leads; content that cannot be read counts as nobody's."""
    if not value:
        return None
    try:
        return msgspec.json.decode(value, type=LeaderKey)
    except msgspec.MsgspecError as error:
        log.warning("the leader's key cannot be read: %s", error)
        return None


class LeaderWatch:
    """Tells where the leader is, now and whenever it changes: by `next`, or by `async for`."""

    def __init__(self, bus: Bus, cluster: str) -> None:
        self._bus = bus
        self._cell = LeasedKey(bus, Subjects(cluster).leader_bucket, LEADER_KEY)
        self._feed: Feed[bytes | None] | None = None
        self._first = True
        self.address = ""  # "host:port", as told last; empty: nobody leads

    async def next(self) -> str:
        """The leader's address at the first call, and then once it is another one; "" while nobody
        leads. Waits while the broker is away.
        """
        if self._feed is None:
            self._feed = await (self._cell.watch() if self._bus.has_consumers else self._asked())
        while True:
            key = read_key(await self._feed.next())
            address = key.address if key is not None and key.term else ""
            if self._first or address != self.address:
                self._first, self.address = False, address
                return address

    async def _asked(self) -> Feed[bytes | None]:
        """What a watch says, where the broker gives this account none."""
        feed: Feed[bytes | None] = Feed(16)
        feed.attach(self._bus.own(self._keep_asking(feed)))
        return feed

    async def _keep_asking(self, feed: Feed[bytes | None]) -> None:
        told: list[bytes | None] = []
        while True:
            with suppress(BrokerUnavailable):
                found = await self._cell.get()
                value = found[0] if found is not None else None
                if told != [value]:
                    told = [value]
                    feed.put(value)
            await asyncio.sleep(_ASK_EVERY_S)

    def __aiter__(self) -> LeaderWatch:
        return self

    async def __anext__(self) -> str:
        return await self.next()

    async def close(self) -> None:
        """Ends the watch."""
        if self._feed is not None:
            await self._feed.close()
