"""Results: read from the object store piece by piece, checked as they pass, handed on.

A call holds at most two pieces: the one that its caller takes, and the one after it, without which
nobody knows whether the first is the last. Pieces are asked for one at a time (JetStream's direct
get), when the caller is ready for them: there is no subscription, no consumer and no buffer that a
caller who goes away could leave behind, and a slow caller makes the broker wait, not this process.

An object's pieces are the messages on one subject, in order; its name leads to that subject by a
small description (NATS ADR-20).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from hocket.clock import Clock
from hocket.errors import RequestFailed
from hocket.messaging.bus import Bus
from hocket.v1.generation_pb2 import MediaChunk
from hocket.v1.types_pb2 import MediaInfo

CHUNK_BYTES_MAX = 256 << 10
_AWAY = (nats.errors.Error, nats.js.errors.ServiceUnavailableError, OSError)
_PAUSE_US = 100_000


class _Piece(NamedTuple):
    sequence: int
    content: bytes


class MediaStore:
    """The bucket into which workers write results."""

    def __init__(self, bus: Bus, bucket: str, clock: Clock, *, wait_us: int) -> None:
        """`wait_us`: how long the broker may be away before a fetch is given up."""
        self._bus = bus
        self._clock = clock
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"
        self._wait_us = wait_us

    async def chunks(self, media: MediaInfo, offset: int = 0) -> AsyncIterator[MediaChunk]:
        """The result from `offset` on, in order; the first chunk says what they make up, and there
        is always one.

        What lies before the offset is read all the same, so that the digest of the whole is known
        before the last chunk leaves. Raises RequestFailed: MEDIA_LOST, MEDIA_UNAVAILABLE when the
        broker stays away, MEDIA_CORRUPT instead of the last chunk.
        """
        hashed = hashlib.sha256()
        at, first, held = 0, True, b""
        async for piece in self._pieces(media):
            hashed.update(piece)  # at most a message of the broker: a fraction of a millisecond
            wanted = piece[max(0, offset - at) :]
            at += len(piece)
            for start in range(0, len(wanted), CHUNK_BYTES_MAX):
                if held:
                    yield _chunk(media, at - len(wanted) + start - len(held), held, first)
                    first = False
                held = wanted[start : start + CHUNK_BYTES_MAX]
        if at != media.size_bytes or hashed.hexdigest() != media.sha256:
            told = f"{media.object_name} is not what the worker wrote"
            raise RequestFailed("MEDIA_CORRUPT", told)
        if held or first:
            yield _chunk(media, at - len(held), held, first)

    async def _pieces(self, media: MediaInfo) -> AsyncIterator[bytes]:
        subject = f"$O.{self._bucket}.C.{await self._nuid(media.object_name)}"
        sequence, left = 1, media.size_bytes
        while left > 0:
            piece = await self._next(subject, sequence, media.object_name)
            yield piece.content
            sequence, left = piece.sequence + 1, left - len(piece.content)

    async def _nuid(self, name: str) -> str:
        encoded = base64.urlsafe_b64encode(name.encode()).decode()
        message = await self._get(f"$O.{self._bucket}.M.{encoded}", None, name)
        facts = json.loads(message.data or b"{}")
        if facts.get("deleted") or not facts.get("nuid"):
            raise _lost(name)
        return str(facts["nuid"])

    async def _next(self, subject: str, sequence: int, name: str) -> _Piece:
        message = await self._get(subject, sequence, name)
        return _Piece(message.seq or 0, message.data or b"")

    async def _get(self, subject: str, sequence: int | None, name: str) -> RawStreamMsg:
        """The newest message on a subject, or the first one from a sequence on.

        Any copy of the stream answers, until one lacks it: that may be behind, and the copy that
        leads is asked.
        """
        jetstream: JetStreamContext = self._bus.jetstream
        until_us = self._clock.now_us() + self._wait_us
        direct = True
        while True:
            try:
                return await jetstream.get_msg(
                    self._stream,
                    seq=sequence,
                    subject=subject,
                    direct=direct,
                    next=sequence is not None,
                )
            except nats.js.errors.NotFoundError as error:
                if not direct:
                    raise _lost(name) from error
                direct = False
                continue
            except _AWAY as error:
                if self._clock.now_us() >= until_us:
                    told = f"{name} could not be read: {error or type(error).__name__}"
                    raise RequestFailed("MEDIA_UNAVAILABLE", told) from error
            await self._clock.sleep_until(self._clock.now_us() + _PAUSE_US)


def _chunk(media: MediaInfo, offset: int, content: bytes, first: bool) -> MediaChunk:
    return MediaChunk(info=media if first else None, offset=offset, data=content)


def _lost(name: str) -> RequestFailed:
    return RequestFailed("MEDIA_LOST", f"{name} is not in the object store")
