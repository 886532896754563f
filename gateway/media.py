"""Results: fetched from the object store, checked against their digest, cut into chunks."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Iterator

import nats.errors
import nats.js.errors
from nats.js.object_store import ObjectStore

from hocket.bus import Bus
from hocket.errors import RequestFailed
from hocket.v1.generation_pb2 import MediaChunk
from hocket.v1.types_pb2 import MediaInfo

CHUNK_BYTES = 256 << 10


class MediaStore:
    """The bucket into which workers write results. Holds a bounded number of them in memory."""

    def __init__(
        self, bus: Bus, bucket: str, *, bytes_max: int, fetches_max: int, timeout_s: float
    ) -> None:
        self._bus = bus
        self._bucket = bucket
        self._bytes_max = bytes_max
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(fetches_max)
        self._store: ObjectStore | None = None

    async def fetch(self, media: MediaInfo) -> bytes:
        """The whole result; raises RequestFailed when it is lost, too large or corrupt."""
        if media.size_bytes > self._bytes_max:
            told = f"{media.size_bytes} bytes; this gateway hands out at most {self._bytes_max}"
            raise RequestFailed("MEDIA_TOO_LARGE", told)
        async with self._turns:
            try:
                async with asyncio.timeout(self._timeout_s):
                    whole = await self._read(media.object_name)
            except (nats.js.errors.NotFoundError, nats.js.errors.BucketNotFoundError) as error:
                told = f"{media.object_name} is not in the object store"
                raise RequestFailed("MEDIA_LOST", told) from error
            except (TimeoutError, nats.errors.Error) as error:
                told = f"{media.object_name} could not be read: {error or 'too slow'}"
                raise RequestFailed("MEDIA_UNAVAILABLE", told) from error
        if hashlib.sha256(whole).hexdigest() != media.sha256:
            told = f"{media.object_name} is not what the worker wrote"
            raise RequestFailed("MEDIA_CORRUPT", told)
        return whole

    async def _read(self, name: str) -> bytes:
        if self._store is None:
            self._store = await self._bus.jetstream.object_store(self._bucket)
        into = io.BytesIO()
        found = await self._store.get(name, writeinto=into)
        return into.getvalue() or bytes(found.data or b"")


def chunks(media: MediaInfo, whole: bytes) -> Iterator[MediaChunk]:
    """The pieces in order; the first one says what they make up."""
    for offset in range(0, max(len(whole), 1), CHUNK_BYTES):
        info = media if offset == 0 else None
        yield MediaChunk(info=info, offset=offset, data=whole[offset : offset + CHUNK_BYTES])
