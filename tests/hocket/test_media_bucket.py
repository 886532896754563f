"""Control's side of the bucket for media: its bounds, also where it was made without any."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from nats.js.api import ObjectStoreConfig, StreamConfig

from hocket.clock import ManualClock
from hocket.messaging import media_bucket
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.media_bucket import BYTES_MAX, KEPT_S, Bounds
from tests.brokers import broker_cluster

WAIT_S = 60.0


async def looked_after(bus: Bus, subjects: Subjects, bounds: Bounds) -> None:
    """Returns once control has seen to the bucket."""
    clock = ManualClock()
    keeping = asyncio.ensure_future(media_bucket.keep(bus, subjects, clock, bounds))
    async with asyncio.timeout(WAIT_S):
        while (wake_us := clock.next_wake_us()) is None or wake_us - clock.now_us() < 10_000_000:
            if wake_us is not None:  # the broker was not ready
                clock.advance_to(wake_us)
            await asyncio.sleep(0.01)
    keeping.cancel()


async def shape(bus: Bus, subjects: Subjects) -> StreamConfig:
    return (await bus.jetstream.stream_info(f"OBJ_{subjects.media_bucket}")).config


async def test_a_bucket_without_bounds_gets_them_and_keeps_what_is_in_it(
    bus: Bus, subjects: Subjects, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    old = await bus.jetstream.create_object_store(subjects.media_bucket)
    await old.put("file", b"made before")
    assert ((await shape(bus, subjects)).max_bytes or -1) < 0
    await looked_after(bus, subjects, Bounds())
    assert "now: " in caplog.text
    config = await shape(bus, subjects)
    assert 0 < (config.max_bytes or 0) <= BYTES_MAX and config.max_age == KEPT_S
    assert (await old.get("file")).data == b"made before"


async def test_bounds_that_are_set_are_those_of_an_older_bucket(
    bus: Bus, subjects: Subjects, caplog: pytest.LogCaptureFixture
) -> None:
    """Also below what is in it."""
    caplog.set_level(logging.WARNING)
    config = ObjectStoreConfig(max_bytes=8 << 20, ttl=60.0)
    old = await bus.jetstream.create_object_store(subjects.media_bucket, config)
    for number in range(4):
        await old.put(f"file{number}", bytes(300_000))
    await looked_after(bus, subjects, Bounds(1 << 20, 90.0))
    assert "now: " in caplog.text
    found = await shape(bus, subjects)
    assert (found.max_bytes, found.max_age) == (1 << 20, 90.0)
    caplog.clear()
    await looked_after(bus, subjects, Bounds(1 << 20, 90.0))
    assert "now: " not in caplog.text


async def test_in_a_cluster_of_brokers_it_has_as_many_copies_as_the_promises(
    tmp_path: Path,
) -> None:
    """New, and where an older version made it with one."""
    with broker_cluster(tmp_path) as brokers:
        bus = await Bus.connect(",".join(broker.url for broker in brokers), "control")
        old, new = Subjects("old"), Subjects("new")
        await looked_after(bus, new, Bounds(1 << 20, 60.0, 3))
        config = ObjectStoreConfig(max_bytes=1 << 20, ttl=60.0)
        await bus.jetstream.create_object_store(old.media_bucket, config)
        await looked_after(bus, old, Bounds(1 << 20, 60.0, 3))
        for subjects in (old, new):
            assert (await shape(bus, subjects)).num_replicas == 3
        await bus.close()
