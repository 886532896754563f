"""How much of the store of inputs each tenant holds, by what the bucket says.

The bucket lists its descriptions; the size of each is read once, since a name means one content.
Old pieces of what was uploaded again are not counted: they go when their time is over.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache

import nats.js.errors

from hocket.clock import Clock
from hocket.errors import Refused
from hocket.messaging.bus import Bus

_LOOK_EVERY_US = 10_000_000
_RETRY_US = 60_000_000
_SHARE = 4  # of the bucket, where nothing is set: one part in so many


class TenantShares:
    """Of one gateway. What it stores itself counts at once; what others store, soon."""

    def __init__(self, bus: Bus, bucket: str, clock: Clock, bytes_max: int = 0) -> None:
        """`bytes_max`: what one tenant may hold; 0: a quarter of the bucket."""
        self._bus = bus
        self._bucket = bucket
        self._clock = clock
        self._bytes_max = bytes_max
        self._most = 0  # 0: no bound
        self._looked_us: int | None = None
        self._subjects: set[str] = set()
        self._sizes: dict[str, int] = {}  # by subject

    async def check(self, tenant: str, size: int) -> None:
        """Raises Refused (INPUTS_FULL) where a tenant that holds something would hold too much."""
        await self._look()
        held = await self._held(tenant) if self._most else 0
        if held and held + size > self._most:
            told = f"tenant {tenant!r} holds {held} bytes of inputs and {size} more are too many"
            raise Refused("INPUTS_FULL", f"{told}; allowed: {self._most}", _RETRY_US)

    def stored(self, subject: str, size: int) -> None:
        """A file was stored, described on that subject."""
        self._subjects.add(subject)
        self._sizes[subject] = size

    async def _look(self) -> None:
        now_us = self._clock.now_us()
        if self._looked_us is not None and now_us - self._looked_us < _LOOK_EVERY_US:
            return
        self._looked_us = now_us
        info = await self._bus.jetstream.stream_info(
            f"OBJ_{self._bucket}", subjects_filter=f"$O.{self._bucket}.M.*"
        )
        self._most = self._bytes_max or max(0, info.config.max_bytes or 0) // _SHARE
        self._subjects = set(info.state.subjects or ())
        self._sizes = {s: size for s, size in self._sizes.items() if s in self._subjects}

    async def _held(self, tenant: str) -> int:
        held = 0
        for subject in [s for s in self._subjects if _tenant_of(s) == tenant]:
            if subject not in self._sizes:
                self._sizes[subject] = await self._size(subject)
            held += self._sizes[subject]
        return held

    async def _size(self, subject: str) -> int:
        try:
            found = await self._bus.jetstream.get_msg(f"OBJ_{self._bucket}", subject=subject)
        except nats.js.errors.NotFoundError:
            return 0  # its time was over meanwhile
        described = json.loads(found.data or b"{}")
        return 0 if described.get("deleted") else int(described.get("size", 0))


@lru_cache(16_384)
def _tenant_of(subject: str) -> str:
    name = base64.urlsafe_b64decode(subject.rpartition(".")[2])
    return name.decode(errors="replace").rpartition("/")[0]
