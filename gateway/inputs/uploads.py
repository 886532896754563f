"""PutInput: a picture comes in piece by piece, is decoded and stored.

A few uploads are received at once, and fewer of one tenant; others wait before their first piece is
read, so that the gateway's memory is bounded and nobody keeps all others out. Two are decoded at
once, beside the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from gateway.inputs import pictures
from gateway.inputs.store import InputStore
from hocket.errors import InvalidRequest, Refused, Violation
from hocket.v1.generation_pb2 import InputHeader, PutInputRequest, PutInputResponse

PIECE_BYTES_MAX = 256 << 10
_AT_ONCE = 16
_AT_ONCE_OF_A_TENANT = 4
_DECODED_AT_ONCE = 2
_SHA256 = re.compile(r"(?:[0-9a-f]{64})?")


class Uploads:
    """Takes files in. One a gateway; close it."""

    def __init__(self, store: InputStore, patience_s: float) -> None:
        """`patience_s`: how long an upload may take."""
        self._store = store
        self._patience_s = patience_s
        self._turns = _Turns()
        self._pool = ThreadPoolExecutor(_DECODED_AT_ONCE, "decoding")

    async def put(
        self, pieces: AsyncIterator[PutInputRequest], tenant_of: Callable[[str], str]
    ) -> PutInputResponse:
        """One upload. `tenant_of` says whose it is, of what the header says, or raises.

        Raises InvalidRequest, Refused (CALLER_TOO_SLOW, INPUTS_FULL) and NotReady.
        """
        try:
            async with asyncio.timeout(self._patience_s):
                header = await _header(pieces)
                tenant = tenant_of(header.tenant)
                async with self._turns.one(tenant):
                    content = await _received(pieces, header)
                    return await self._stored(tenant, content, mask=header.mask)
        except TimeoutError:
            told = f"the upload took longer than {self._patience_s:g} s"
            raise Refused("CALLER_TOO_SLOW", told) from None

    def close(self) -> None:
        """Takes nothing more in."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _stored(self, tenant: str, content: bytes, *, mask: bool) -> PutInputResponse:
        loop = asyncio.get_running_loop()
        work = partial(pictures.converted, content, mask=mask)
        made = await loop.run_in_executor(self._pool, work)
        name, kept_us = await self._store.put(tenant, made.png)
        return PutInputResponse(
            name=name,
            width=made.width,
            height=made.height,
            conversions=made.conversions,
            kept_us=kept_us,
        )


class _Turns:
    """Who may receive now."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(_AT_ONCE)
        self._of: dict[str, asyncio.Semaphore] = {}
        self._here: Counter[str] = Counter()  # uploads by tenant, those that wait included

    @asynccontextmanager
    async def one(self, tenant: str) -> AsyncIterator[None]:
        self._here[tenant] += 1
        own = self._of.setdefault(tenant, asyncio.Semaphore(_AT_ONCE_OF_A_TENANT))
        try:
            async with own, self._all:
                yield
        finally:
            self._here[tenant] -= 1
            if not self._here[tenant]:
                del self._here[tenant], self._of[tenant]


async def _header(pieces: AsyncIterator[PutInputRequest]) -> InputHeader:
    async for first in pieces:
        header = first.header
        if not first.HasField("header"):
            raise _wrong("header", "nothing", "the first message has the header")
        if not _SHA256.fullmatch(header.sha256):
            raise _wrong("header.sha256", repr(header.sha256[:80]), "64 hex digits, or nothing")
        if header.size_bytes > pictures.FILE_BYTES_MAX:
            raise _too_large("header.size_bytes", header.size_bytes)
        return header
    raise _wrong("header", "an empty stream", "a header, and then the file")


async def _received(pieces: AsyncIterator[PutInputRequest], header: InputHeader) -> bytes:
    whole = bytearray()
    async for piece in pieces:
        if not piece.HasField("data"):
            raise _wrong("data", "another header", "pieces of the file")
        if len(piece.data) > PIECE_BYTES_MAX:
            raise _wrong("data", f"a piece of {len(piece.data)} bytes", f"{PIECE_BYTES_MAX} each")
        whole += piece.data
        if len(whole) > pictures.FILE_BYTES_MAX:
            raise _too_large("data", len(whole))
    if header.size_bytes and header.size_bytes != len(whole):
        raise _wrong("data", f"{len(whole)} bytes", f"{header.size_bytes}, as the header says")
    content = bytes(whole)
    if header.sha256:
        digest = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
        if digest != header.sha256:
            raise _wrong("header.sha256", header.sha256, f"{digest}, of what came")
    return content


def _too_large(field: str, size: int) -> InvalidRequest:
    return _wrong(field, f"{size} bytes", f"at most {pictures.FILE_BYTES_MAX}")


def _wrong(field: str, found: str, allowed: str) -> InvalidRequest:
    return InvalidRequest((Violation(field, f"found {found}; allowed: {allowed}"),))
