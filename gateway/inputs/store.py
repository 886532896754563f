"""Uploaded inputs in the cluster's object store, where workers read them.

An object is named by its tenant and by the digest of its content, so that nobody can name what
others have uploaded. It is written once: the same content again renews it only when half of its
time is over, by new pieces beside the old ones, which somebody may be reading.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
from collections.abc import Collection
from contextlib import suppress

import nats.errors
import nats.js.errors
from nats.js import api
from nats.js.api import RawStreamMsg

from gateway.inputs.shares import TenantShares
from hocket import clock as clocks
from hocket.clock import Clock
from hocket.errors import BrokerAway, NotReady, Refused
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.subjects import input_object

_PIECE_BYTES = 128 << 10
_NO_STREAM = (
    nats.errors.NoRespondersError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.NotFoundError,
)
_FULL = {10023, 10047, 10077, 10122}  # error codes of nats-server
_LOOK_EVERY_US = 60_000_000
_FULL_RETRY_US = 60_000_000
_NEEDED_US = 600_000_000  # of a request without a deadline
_ALONE = {api.Header.ROLLUP.value: "sub"}  # this message of its subject is the only one
_GIVE_BACK_S = 2.0


class InputStore:
    """The bucket of inputs. One a gateway."""

    def __init__(
        self, bus: Bus, subjects: Subjects, clock: Clock, tenant_bytes_max: int = 0
    ) -> None:
        """`tenant_bytes_max`: what one tenant may hold; 0: a quarter of the bucket."""
        self._bus = bus
        self._bucket = subjects.input_bucket
        self._stream = f"OBJ_{self._bucket}"
        self._clock = clock
        self._shares = TenantShares(bus, self._bucket, clock, tenant_bytes_max)
        self._kept_us = 0
        self._looked_us: int | None = None

    async def put(self, tenant: str, content: bytes) -> tuple[str, int]:
        """Stores a file; its name, and for how long it is kept at least, in microseconds.

        Raises Refused (INPUTS_FULL) and NotReady.
        """
        digest = hashlib.sha256(content)
        name = f"sha256:{digest.hexdigest()}"
        try:
            kept_us = await self._bound_us()
            known = await self._description(input_object(tenant, name))
            left_us = 0 if known is None else kept_us - _age_us(known)
            if kept_us and left_us > kept_us // 2:
                return name, left_us
            if known is None:
                await self._shares.check(tenant, len(content))
            await self._write(input_object(tenant, name), content, digest.digest())
            self._shares.stored(self._subject(input_object(tenant, name)), len(content))
        except nats.js.errors.APIError as error:
            if error.err_code not in _FULL:
                raise _away(error) from error
            told = "the store of inputs is full until older ones are over their time"
            raise Refused("INPUTS_FULL", told, _FULL_RETRY_US) from error
        except (nats.errors.Error, OSError) as error:
            raise _away(error) from error
        return name, kept_us

    async def absent(
        self, tenant: str, names: Collection[str], needed_us: int = 0
    ) -> frozenset[str]:
        """Those of some names under which the tenant has nothing that is kept for long enough yet:
        for `needed_us`; 0: for as long as is said of a request without a deadline. Raises NotReady.
        """
        try:
            kept_us = await self._bound_us() if names else 0
            found = {
                name: await self._description(input_object(tenant, name)) for name in set(names)
            }
        except (nats.errors.Error, OSError) as error:
            raise _away(error) from error
        # No more than half of its time: what has more left is not renewed by uploading it again.
        needed_us = min(needed_us or _NEEDED_US, kept_us // 2)
        return frozenset(
            name
            for name, known in found.items()
            if known is None or (kept_us and kept_us - _age_us(known) < needed_us)
        )

    async def _write(self, name: str, content: bytes, digest: bytes) -> None:
        jetstream, nuid = self._bus.jetstream, secrets.token_hex(11)
        pieces = range(0, len(content), _PIECE_BYTES)
        at = f"$O.{self._bucket}.C.{nuid}"
        try:
            for start in pieces:
                await jetstream.publish(at, content[start : start + _PIECE_BYTES])
        except BaseException:  # it is called off, too: nobody could name what has come so far
            await self._give_back(at)
            raise
        described = {
            "name": name,
            "bucket": self._bucket,
            "nuid": nuid,
            "size": len(content),
            "chunks": len(pieces),
            "digest": f"SHA-256={base64.urlsafe_b64encode(digest).decode()}",
            "options": {"max_chunk_size": _PIECE_BYTES},
        }
        try:
            text = json.dumps(described).encode()
            await jetstream.publish(self._subject(name), text, headers=_ALONE)
        except nats.js.errors.APIError:  # not where no answer came: it may be stored
            await self._give_back(at)
            raise

    async def _give_back(self, pieces: str) -> None:
        """Puts nothing in the place of the pieces of a file that is not stored."""
        with suppress(nats.errors.Error, OSError, TimeoutError):
            publishing = self._bus.jetstream.publish(pieces, b"", headers=_ALONE)
            await asyncio.wait_for(publishing, _GIVE_BACK_S)

    async def _description(self, name: str) -> RawStreamMsg | None:
        """A copy of the stream that lacks it may be behind: the one that leads is asked then."""
        for direct in (True, False):
            try:
                found: RawStreamMsg = await self._bus.jetstream.get_msg(
                    self._stream, subject=self._subject(name), direct=direct
                )
            except nats.js.errors.NotFoundError:
                continue
            return None if json.loads(found.data or b"{}").get("deleted") else found
        return None

    async def _bound_us(self) -> int:
        """How long the bucket keeps what it holds; 0: for ever."""
        now_us = self._clock.now_us()
        if self._looked_us is None or now_us - self._looked_us >= _LOOK_EVERY_US:
            info = await self._bus.jetstream.stream_info(self._stream)
            self._kept_us, self._looked_us = round((info.config.max_age or 0.0) * 1e6), now_us
        return self._kept_us

    def _subject(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _age_us(known: RawStreamMsg) -> int:
    assert known.time is not None, "the broker stamps what it stores"
    return max(0, clocks.unix_ns() // 1000 - round(known.time.timestamp() * 1e6))


def _away(error: Exception) -> NotReady:
    if isinstance(error, _NO_STREAM):
        return NotReady("the store of inputs is not there yet")
    return BrokerAway()
