"""The shape of the bucket for finished media: bounded in bytes and in time, so that no flood of
results fills the disk that promises are written to.

Control makes it. On a broker with roles nobody else may: a stream's configuration can copy others'
messages in, or its own out to any subject.
"""

from __future__ import annotations

import logging
from typing import NoReturn

import nats.errors
from nats.js.api import ObjectStoreConfig
from nats.js.errors import APIError, NotFoundError
from nats.js.object_store import ObjectStore

from hocket.bus import Bus, Subjects
from hocket.cancelling import cancellable
from hocket.clock import Clock

log = logging.getLogger(__name__)

BYTES_MAX = 4 << 30  # where the broker has as much
KEPT_S = 24 * 3600.0
_BYTES_LEAST = 16 << 20
_LOOK_EVERY_US = 60_000_000  # a broker may come back without its store
_AGAIN_US = 2_000_000
_NO_ROOM, _EXISTS = (10023, 10028, 10047), 10058  # error codes of nats-server


async def opened(bus: Bus, bucket: str, bytes_max: int, kept_s: float) -> ObjectStore:
    """The bucket; made where there is none, of `bytes_max` or (0) as large as the broker has room
    for. Raises errors of NATS.
    """
    try:
        return await cancellable(bus.jetstream.object_store(bucket))
    except NotFoundError:
        return await _made(bus, bucket, bytes_max, kept_s)


async def keep(
    bus: Bus, subjects: Subjects, clock: Clock, bytes_max: int, kept_s: float
) -> NoReturn:
    """Sees to it that the bucket is there, until cancelled; trouble is logged and ends nothing."""
    while True:
        wait_us = _LOOK_EVERY_US
        try:
            await opened(bus, subjects.media_bucket, bytes_max, kept_s)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.warning("cannot make the store for media yet: %s: %s", type(error).__name__, error)
            wait_us = _AGAIN_US
        await clock.sleep_until(clock.now_us() + wait_us)


async def _made(bus: Bus, bucket: str, bytes_max: int, kept_s: float) -> ObjectStore:
    size = bytes_max or BYTES_MAX
    while True:
        config = ObjectStoreConfig(bucket=bucket, ttl=kept_s, max_bytes=size)
        try:
            return await cancellable(bus.jetstream.create_object_store(bucket, config))
        except APIError as error:
            if error.err_code == _EXISTS:  # another one was quicker
                return await cancellable(bus.jetstream.object_store(bucket))
            if error.err_code not in _NO_ROOM or bytes_max or size <= _BYTES_LEAST:
                raise
        size //= 4  # others want room, too
