"""Results out of a real object store: bounded, checked, from any offset, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from hashlib import sha256
from typing import Any

import pytest
from nats.js.errors import NotFoundError

from gateway.media import MediaStore
from hocket.clock import SystemClock
from hocket.errors import RequestFailed
from hocket.messaging.bus import Bus, Subjects
from hocket.v1.generation_pb2 import MediaChunk
from hocket.v1.types_pb2 import MediaInfo

PIECE = 128 << 10
LARGE = 40 << 20


async def stored(bus: Bus, subjects: Subjects, name: str, content: bytes) -> MediaInfo:
    bucket = await bus.jetstream.create_object_store(subjects.media_bucket)
    await bucket.put(name, content)
    return MediaInfo(object_name=name, size_bytes=len(content), sha256=sha256(content).hexdigest())


def store_of(bus: Bus, subjects: Subjects, wait_us: int = 0) -> MediaStore:
    return MediaStore(bus, subjects.media_bucket, SystemClock(), wait_us=wait_us)


def client_of(bus: Bus) -> Any:
    return bus._client


async def consumers(bus: Bus, subjects: Subjects) -> int:
    info = await bus.jetstream.stream_info(f"OBJ_{subjects.media_bucket}")
    return int(info.state.consumer_count)


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 17])
async def test_from_any_offset_the_rest(bus: Bus, subjects: Subjects, size: int) -> None:
    content = bytes(i * 7 % 251 for i in range(size))
    media = await stored(bus, subjects, "a", content)
    store = store_of(bus, subjects)
    for offset in {0, 1, size // 2, max(0, size - 1), size, PIECE, 2 * PIECE + 3}:
        if offset > size:
            continue
        chunks = [chunk async for chunk in store.chunks(media, offset)]
        assert b"".join(chunk.data for chunk in chunks) == content[offset:]
        assert chunks[0].info == media and not any(c.HasField("info") for c in chunks[1:])
        places = [chunk.offset for chunk in chunks]
        lengths = [len(chunk.data) for chunk in chunks]
        assert places == [offset + sum(lengths[:n]) for n in range(len(chunks))]
        assert max(lengths) <= 256 << 10


async def test_a_wrong_digest_is_said_before_the_last_piece(bus: Bus, subjects: Subjects) -> None:
    content = bytes(3 * PIECE)
    media = await stored(bus, subjects, "a", content)
    media.sha256 = "0" * 64
    seen: list[MediaChunk] = []
    with pytest.raises(RequestFailed, match="not what the worker wrote") as caught:
        async for chunk in store_of(bus, subjects).chunks(media):
            seen.append(chunk)
    assert caught.value.reason == "MEDIA_CORRUPT" and len(seen) == 2


async def test_what_is_not_there_is_lost(bus: Bus, subjects: Subjects) -> None:
    media = await stored(bus, subjects, "a", b"x")
    media.object_name = "b"
    with pytest.raises(RequestFailed) as caught:
        await anext(store_of(bus, subjects).chunks(media))
    assert caught.value.reason == "MEDIA_LOST"


async def test_a_copy_that_is_behind_is_not_believed(
    bus: Bus, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(i * 7 % 251 for i in range(3 * PIECE))
    media = await stored(bus, subjects, "a", content)
    ask, behind = bus.jetstream.get_msg, 0

    async def get_msg(*stream: str, direct: bool, **wanted: Any) -> Any:
        nonlocal behind
        if direct:  # any of a cluster's brokers answers, and this one has nothing yet
            behind += 1
            raise NotFoundError(code=404)
        return await ask(*stream, direct=direct, **wanted)

    monkeypatch.setattr(bus.jetstream, "get_msg", get_msg)
    chunks = [chunk async for chunk in store_of(bus, subjects).chunks(media)]
    assert b"".join(chunk.data for chunk in chunks) == content and behind == 4


async def test_a_broker_that_stays_away_is_named(bus: Bus, subjects: Subjects) -> None:
    media = await stored(bus, subjects, "a", b"x")
    missing = MediaStore(bus, "no-such-bucket", SystemClock(), wait_us=0)
    with pytest.raises(RequestFailed) as caught:
        await anext(missing.chunks(media))
    assert caught.value.reason == "MEDIA_UNAVAILABLE"


async def test_callers_that_leave_leave_nothing_behind(bus: Bus, subjects: Subjects) -> None:
    """Twenty broken fetches of 40 MiB used to leave 161 MiB, 15 subscriptions, 15 consumers."""
    media = await stored(bus, subjects, "a", bytes(LARGE))
    store = store_of(bus, subjects)
    await anext(store.chunks(media))  # the client's own subscription for answers is there now
    gc.collect()
    before, held = set(client_of(bus)._subs), _held_bytes()

    async def fetch(pieces: int) -> None:
        count = 0
        async with aclosing(store.chunks(media)) as chunks:
            async for _ in chunks:
                count += 1
                if count == pieces:
                    asyncio.current_task().cancel()  # type: ignore[union-attr]

    await asyncio.gather(*(fetch(n + 1) for n in range(20)), return_exceptions=True)
    gc.collect()
    assert set(client_of(bus)._subs) == before
    assert client_of(bus)._resp_map == {}
    assert await consumers(bus, subjects) == 0
    assert _held_bytes() - held < 4 << 20


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_cancelled_at_any_await(bus: Bus, subjects: Subjects, turns: int) -> None:
    media = await stored(bus, subjects, "a", bytes(8 * PIECE))
    store = store_of(bus, subjects)
    await anext(store.chunks(media))
    before = set(client_of(bus)._subs)

    async def fetch() -> None:
        async with aclosing(store.chunks(media)) as chunks:
            async for _ in chunks:
                pass

    task = asyncio.ensure_future(fetch())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert set(client_of(bus)._subs) == before and client_of(bus)._resp_map == {}
    assert await consumers(bus, subjects) == 0


async def test_slow_callers_hold_two_pieces_each(bus: Bus, subjects: Subjects) -> None:
    media = await stored(bus, subjects, "a", bytes(LARGE))
    gc.collect()
    before = _held_bytes()
    slow = [store_of(bus, subjects).chunks(media) for _ in range(8)]
    for chunks in slow:
        for _ in range(3):
            await anext(chunks)
    await bus.flush()  # whatever the broker would push is here now
    assert _held_bytes() - before <= 8 * 3 * PIECE
    for chunks in slow:
        await chunks.aclose()  # type: ignore[attr-defined]


def _held_bytes() -> int:
    """Of large byte strings that messages and buffers of this process hold."""
    kinds = (bytes, bytearray)
    seen: dict[int, int] = {}
    for owner in gc.get_objects():
        for held in gc.get_referents(owner):
            if type(held) in kinds and len(held) >= PIECE // 2:
                seen[id(held)] = len(held)
    return sum(seen.values())
