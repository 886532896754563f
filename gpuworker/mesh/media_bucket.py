"""A worker's way to the cluster's bucket for finished media (see hocket.messaging.media_bucket).

When it is full the oldest media give way, but for those of the last minute, which somebody is about
to fetch. Ages are told by the broker's stamps alone.
"""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass

import nats.errors
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from hocket.clock import Clock
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.media_bucket import Bounds, opened

log = logging.getLogger(__name__)

_FRESH_S = 60.0
_EVICTIONS_MAX = 64  # for one file
_WAITS_US = (0, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)  # before each try
_AWAY_WAIT_US = 1_000_000  # between tries while the broker does not answer
_AWAY_MAX_US = 600_000_000
_FULL = 10077  # error code of nats-server


@dataclass
class NotStored(Exception):
    """A file that the store does not take."""

    problem: str

    def __str__(self) -> str:
        return self.problem


class MediaBucket:
    """One worker's way to it."""

    def __init__(
        self, bus: Bus, subjects: Subjects, clock: Clock, bytes_max: int, kept_s: float
    ) -> None:
        """`bytes_max`: of all media together; 0 derives it from what the broker has."""
        self._bus = bus
        self._bucket = subjects.media_bucket
        self._stream = f"OBJ_{self._bucket}"
        self._clock = clock
        self._bounds = Bounds(bytes_max, kept_s)

    async def put(self, name: str, content: bytes) -> None:
        """Stores a file under a name, waiting for a broker that is away for up to ten minutes.

        Raises `NotStored`: it was refused again and again.
        """
        problem = ""
        away_us = 0
        waits_us = list(_WAITS_US)
        wait_us = waits_us.pop(0)
        while True:
            await self._clock.sleep_until(self._clock.now_us() + wait_us)
            before_us = self._clock.now_us()
            try:
                await self._put(name, content)
                return
            except (nats.errors.Error, OSError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
                log.warning("cannot store the media of %s yet: %s", name, problem)
                refused = isinstance(error, APIError)  # else nobody answered
            if not refused and away_us < _AWAY_MAX_US:
                wait_us = _AWAY_WAIT_US
                away_us += wait_us + self._clock.now_us() - before_us
            elif waits_us:
                wait_us = waits_us.pop(0)
            else:
                raise NotStored(problem)

    async def _put(self, name: str, content: bytes) -> None:
        store = await opened(self._bus, self._bucket, self._bounds)
        for left in reversed(range(_EVICTIONS_MAX)):
            try:
                await store.put(name, io.BytesIO(content))
                return
            except APIError as error:
                if error.err_code != _FULL or not left or not await self._evict_oldest():
                    raise

    async def _evict_oldest(self) -> bool:
        """Drops the media that were finished first, with all that is known of them; false when
        there are none, or only fresh ones.
        """
        jetstream = self._bus.jetstream
        every = f"$O.{self._bucket}.M.>"
        try:
            newest = await jetstream.get_msg(self._stream, subject=f"$O.{self._bucket}.>")
            oldest = await jetstream.get_msg(self._stream, seq=1, subject=every, next=True)
        except NotFoundError:
            return False
        assert newest.time and oldest.time and oldest.data, "the broker stamps what it stores"
        age_s = (newest.time - oldest.time).total_seconds()
        if age_s < _FRESH_S:
            return False
        log.info("the media store is full: dropping %s, %.0f s old", _name(oldest), age_s)
        chunks = json.loads(oldest.data)["nuid"]
        await jetstream.purge_stream(self._stream, subject=f"$O.{self._bucket}.C.{chunks}")
        await jetstream.purge_stream(self._stream, subject=oldest.subject)
        return True


def _name(entry: RawStreamMsg) -> str:
    return str(json.loads(entry.data or b"{}").get("name"))
