"""Who of several control replicas leads: a key with a time to live on the broker.

The leader renews it every second; when it has gone for good, a standby takes it. A broker that
stands still lets the key expire and deposes nobody: the leader takes its key again, in the same
term, if no other one has taken the promises stream over meanwhile (a standby gives it a moment for
that). What a leader must not do after another one leads is refused by the broker anyway: see
`promises`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

import msgspec

from control.leading.promises import Deposed
from hocket.clock import Clock
from hocket.errors import BrokerUnavailable
from hocket.messaging.leader import LeaderKey, read_key
from hocket.messaging.stores import LeasedKey, LogFull, OutcomeUnknown

log = logging.getLogger(__name__)

_AGAIN_US = 200_000  # after a try whose outcome is not known


class Leadership:
    """One replica's side of it."""

    def __init__(
        self, cell: LeasedKey, clock: Clock, address: str, incarnation: str, *, ttl_us: int
    ) -> None:
        self._cell = cell
        self._clock = clock
        self._address = address
        self._incarnation = incarnation
        self._renew_us = ttl_us // 3
        self._again_us = ttl_us // 12  # after a renewal that is in doubt: well within …
        self._courtesy_us = ttl_us // 4  # … what a standby grants an incumbent whose key expired
        self._revision = 0
        self._renewing = asyncio.Lock()
        self.term = 0  # until it serves

    async def win(self) -> int:
        """Waits until the key can be had and takes it; returns its revision, which only rises."""
        watch = await self._cell.watch()
        self.term = 0
        try:
            first = True
            while True:
                value = await watch.next()
                while watch.pending:
                    value = await watch.next()
                key = read_key(value)
                mine = key is not None and key.incarnation == self._incarnation
                if key is None or not key.address or mine:
                    if key is None and not first:
                        await self._pause(self._courtesy_us)
                    if await self._claim():
                        return self._revision
                first = False
        finally:
            await watch.close()

    async def keep(self, is_ours: Callable[[], Awaitable[bool]]) -> NoReturn:
        """Renews until cancelled. `is_ours`: whether the promises stream still is.

        Raises Deposed when another one leads.
        """
        renewed = True
        while True:
            await self._pause(self._renew_us if renewed else self._again_us)
            renewed = await self._try_to_renew(is_ours)

    async def tell(self, term: int, is_ours: Callable[[], Awaitable[bool]]) -> None:
        """Says in the key that this replica serves now, in this term. Raises Deposed."""
        self.term = term
        await self._try_to_renew(is_ours)

    async def resign(self) -> None:
        """Lets a standby lead at once. A broker that is away is not waited for."""
        key = LeaderKey(address="", term=self.term)
        try:
            await self._cell.update(msgspec.json.encode(key), self._revision)
        except (OutcomeUnknown, LogFull) as error:
            log.debug("the leader's key was not given back: %s", error)

    async def _try_to_renew(self, is_ours: Callable[[], Awaitable[bool]]) -> bool:
        """Whether it is renewed; False: it is not known, or nobody leads. Raises Deposed."""
        try:
            async with self._renewing:
                return await self._renew(is_ours)
        except (OutcomeUnknown, BrokerUnavailable, LogFull) as error:
            log.debug("the leader's key was not renewed: %s", error)
            with suppress(BrokerUnavailable):
                if not await is_ours():  # the broker came back without its store
                    raise Deposed(self.term, 0) from error
            return False

    async def _renew(self, is_ours: Callable[[], Awaitable[bool]]) -> bool:
        revision = await self._cell.update(self._value(), self._revision)
        if revision is None:
            found = await self._cell.get()
            key = read_key(found[0]) if found is not None else None
            if found is not None and key is not None and key.incarnation == self._incarnation:
                self._revision = found[1]  # stored after all
                return True
            if key is not None and key.address:
                raise Deposed(self.term, key.term)
            if not await is_ours():
                raise Deposed(self.term, 0)
            revision = await self._cell.create(self._value())
            if revision is None:
                return False  # somebody else was quicker: seen at the next turn
            log.warning("the leader's key had expired; leading on in term %d", self.term)
        self._revision = revision
        return True

    async def _claim(self) -> bool:
        """Tries to take a key that seems to be free, until it is known whether that worked."""
        while True:
            try:
                found = await self._cell.get()
                key = read_key(found[0]) if found is not None else None
                if found is None:
                    revision = await self._cell.create(self._value())
                elif key is None or not key.address or key.incarnation == self._incarnation:
                    revision = await self._cell.update(self._value(), found[1])
                else:
                    return False
            except (OutcomeUnknown, BrokerUnavailable, LogFull):
                await self._pause(_AGAIN_US)
                continue
            if revision is None:
                return False
            self._revision = revision
            return True

    def _value(self) -> bytes:
        key = LeaderKey(address=self._address, term=self.term, incarnation=self._incarnation)
        return msgspec.json.encode(key)

    async def _pause(self, wait_us: int) -> None:
        await self._clock.sleep_until(self._clock.now_us() + wait_us)
