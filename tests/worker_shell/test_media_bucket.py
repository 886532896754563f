"""The bucket of finished media is bounded: the oldest give way, fresh ones never do."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from nats.js.errors import ObjectNotFoundError

from gpuworker.mesh import media_bucket
from gpuworker.mesh.media_bucket import MediaBucket, NotStored
from hocket.clock import ManualClock
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.media_bucket import BYTES_MAX
from tests.worker_shell.desk import Desk

FILE_BYTES = 100_000
ROOM_BYTES = 350_000


async def play(clock: ManualClock, awaited: Awaitable[Any]) -> Any:
    """Lets time run until something has happened."""
    return await Desk.playing(_Clocked(clock), awaited)  # type: ignore[arg-type]


class _Clocked:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock


async def stored(bus: Bus, subjects: Subjects, names: range) -> list[int]:
    """Which of some files can be had, whole."""
    store = await bus.jetstream.object_store(subjects.media_bucket)
    found = []
    for name in names:
        try:
            media = await store.get(str(name))
        except ObjectNotFoundError:
            continue
        assert media.data == content(name)
        found.append(name)
    return found


def content(name: int) -> bytes:
    return bytes([name]) * FILE_BYTES


async def test_a_full_bucket_lets_the_oldest_go(
    bus: Bus, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_bucket, "_FRESH_S", 0.0)
    bucket = MediaBucket(bus, subjects, ManualClock(), ROOM_BYTES, 3600.0)
    for name in range(10):
        await bucket.put(str(name), content(name))
    assert await stored(bus, subjects, range(10)) == [7, 8, 9]
    state = (await bus.jetstream.stream_info(f"OBJ_{subjects.media_bucket}")).state
    assert state.bytes <= ROOM_BYTES and state.messages == 6, "nothing is left of the others"


async def test_what_somebody_is_about_to_fetch_is_not_dropped(bus: Bus, subjects: Subjects) -> None:
    clock = ManualClock()
    bucket = MediaBucket(bus, subjects, clock, ROOM_BYTES, 3600.0)
    for name in range(3):
        await bucket.put(str(name), content(name))
    with pytest.raises(NotStored, match="maximum bytes exceeded"):
        await play(clock, bucket.put("3", content(3)))
    assert await stored(bus, subjects, range(4)) == [0, 1, 2]


async def test_the_bucket_is_made_with_a_limit_and_an_age(bus: Bus, subjects: Subjects) -> None:
    bucket = MediaBucket(bus, subjects, ManualClock(), 0, 60.0)
    await bucket.put("1", content(1))
    config = (await bus.jetstream.stream_info(f"OBJ_{subjects.media_bucket}")).config
    assert config.max_age == 60.0 and 0 < (config.max_bytes or 0) <= BYTES_MAX
