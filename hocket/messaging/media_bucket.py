"""The shape of the buckets for finished media and for uploaded inputs: bounded in bytes and in
time, so that no flood of files fills the disk that promises are written to.

Control makes it. On a broker with roles nobody else may: a stream's configuration can copy others'
messages in, or its own out to any subject.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import nats.errors
from nats.js.api import ObjectStoreConfig
from nats.js.errors import APIError, NotFoundError
from nats.js.object_store import ObjectStore

from hocket.cancelling import cancellable
from hocket.clock import Clock
from hocket.messaging.bus import Bus, Subjects

log = logging.getLogger(__name__)
T = TypeVar("T")

BYTES_MAX = 4 << 30  # where the broker has as much
INPUT_BYTES_MOST = 1 << 30  # likewise, of uploads
KEPT_S = 24 * 3600.0
_BYTES_LEAST = 16 << 20
_LOOK_EVERY_US = 60_000_000  # a broker may come back without its store
_AGAIN_US = 2_000_000
_NO_ROOM, _EXISTS = (10023, 10028, 10047), 10058  # error codes of nats-server


@dataclass(frozen=True)
class Bounds:
    """What the bucket is to be."""

    bytes_max: int = 0  # 0: what it has, else as large as the broker has room for
    kept_s: float = KEPT_S
    replicas: int = 1  # copies, in a cluster of brokers
    bytes_most: int = BYTES_MAX  # where `bytes_max` is 0 and the broker has room


async def opened(bus: Bus, bucket: str, bounds: Bounds) -> ObjectStore:
    """The bucket, made where there is none. Raises errors of NATS."""
    try:
        return await cancellable(bus.jetstream.object_store(bucket))
    except NotFoundError:
        return await _made(bus, bucket, bounds)


async def keep(
    bus: Bus, subjects: Subjects, clock: Clock, bounds: Bounds, bucket: str = ""
) -> NoReturn:
    """Sees to it that the bucket (that of media, unless another is named) is there, within its
    bounds, until cancelled; trouble is logged and ends nothing.
    """
    bucket = bucket or subjects.media_bucket
    while True:
        wait_us = _LOOK_EVERY_US
        try:
            await opened(bus, bucket, bounds)
            await _bound(bus, bucket, bounds)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.warning("cannot see to the store %s: %s: %s", bucket, type(error).__name__, error)
            wait_us = _AGAIN_US
        await clock.sleep_until(clock.now_us() + wait_us)


async def _bound(bus: Bus, bucket: str, bounds: Bounds) -> None:
    """Changes a bucket that was made by an older version, or with other settings."""
    info = await cancellable(bus.jetstream.stream_info(f"OBJ_{bucket}"))
    config, size = info.config, max(0, info.config.max_bytes or 0)
    age_s, copies = config.max_age or 0.0, config.num_replicas or 1
    wanted = bounds.bytes_max or size
    if (wanted and wanted == size) and (age_s, copies) == (bounds.kept_s, bounds.replicas):
        return

    async def change(size: int) -> None:
        changed = config.evolve(max_bytes=size, max_age=bounds.kept_s, num_replicas=bounds.replicas)
        await cancellable(bus.jetstream.update_stream(changed))
        log.warning(
            "the store %s had other bounds; now: %d MiB, %.0f s, %d copies",
            bucket,
            size >> 20,
            bounds.kept_s,
            bounds.replicas,
        )

    await _with_room(change, wanted, bounds.bytes_most)


async def _made(bus: Bus, bucket: str, bounds: Bounds) -> ObjectStore:
    async def make(size: int) -> ObjectStore:
        config = ObjectStoreConfig(
            bucket=bucket, ttl=bounds.kept_s, max_bytes=size, replicas=bounds.replicas
        )
        return await cancellable(bus.jetstream.create_object_store(bucket, config))

    try:
        return await _with_room(make, bounds.bytes_max, bounds.bytes_most)
    except APIError as error:
        if error.err_code != _EXISTS:
            raise
        return await cancellable(bus.jetstream.object_store(bucket))  # another one was quicker


async def _with_room(work: Callable[[int], Awaitable[T]], bytes_max: int, bytes_most: int) -> T:
    """Does it with so many bytes; 0: with as many as the broker has room for."""
    size = bytes_max or bytes_most
    while True:
        try:
            return await work(size)
        except APIError as error:
            if error.err_code not in _NO_ROOM or bytes_max or size <= _BYTES_LEAST:
                raise
        size //= 4  # others want room, too
