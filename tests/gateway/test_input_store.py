"""The store of uploads: full, renewed, away; and how many receive at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from nats.js.api import ObjectStoreConfig

from gateway.inputs import uploads
from gateway.inputs.store import InputStore
from gateway.inputs.uploads import Uploads
from hocket import clock as clocks
from hocket.clock import SystemClock
from hocket.errors import NotReady, Refused
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.subjects import input_object
from hocket.v1.generation_pb2 import InputHeader, PutInputRequest
from tests.gateway.test_pictures import red, saved
from tests.waiting import until


async def test_a_full_store_refuses_and_one_that_is_not_there_says_so(
    bus: Bus, subjects: Subjects
) -> None:
    store = InputStore(bus, subjects, SystemClock())
    with pytest.raises(NotReady, match="not there yet"):
        await store.put("acme", b"x")
    with pytest.raises(NotReady, match="not there yet"):
        await store.absent("acme", ["sha256:x"])
    config = ObjectStoreConfig(bucket=subjects.input_bucket, max_bytes=400_000)
    await bus.jetstream.create_object_store(subjects.input_bucket, config)
    name, _ = await store.put("acme", b"x" * 200_000)
    with pytest.raises(Refused) as full:
        await store.put("other", b"y" * 300_000)
    assert full.value.reason == "INPUTS_FULL" and full.value.retry_after_us
    info = await bus.jetstream.stream_info(f"OBJ_{subjects.input_bucket}")
    assert info.state.bytes < 220_000, "pieces of what did not fit are given back"
    assert await store.absent("acme", [name]) == frozenset()


async def test_what_is_uploaded_again_is_renewed_in_the_second_half_of_its_time(
    bus: Bus, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ObjectStoreConfig(bucket=subjects.input_bucket, ttl=100.0)
    bucket = await bus.jetstream.create_object_store(subjects.input_bucket, config)
    store, content = InputStore(bus, subjects, SystemClock()), b"x" * 200_000

    async def pieces() -> int:
        info = await bus.jetstream.stream_info(f"OBJ_{subjects.input_bucket}")
        return int(info.state.messages)

    name, kept_us = await store.put("acme", content)
    assert kept_us == 100_000_000 and await pieces() == 3
    again, left_us = await store.put("acme", content)
    assert again == name and 50_000_000 < left_us <= 100_000_000 and await pieces() == 3
    now_ns = clocks.unix_ns
    monkeypatch.setattr(clocks, "unix_ns", lambda: now_ns() + 60_000_000_000)
    assert await store.put("acme", content) == (name, 100_000_000)
    assert await pieces() == 5, "new pieces beside the old ones, which somebody may be reading"
    assert (await bucket.get(input_object("acme", name))).data == content


async def test_what_is_over_before_the_request_is_counts_as_absent(
    bus: Bus, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ObjectStoreConfig(bucket=subjects.input_bucket, ttl=2000.0)
    await bus.jetstream.create_object_store(subjects.input_bucket, config)
    store, now_ns = InputStore(bus, subjects, SystemClock()), clocks.unix_ns
    name, _ = await store.put("acme", b"x")
    day_us = 86_400_000_000
    for age_s, needed_us, is_absent in (
        (0, 0, False),
        (0, day_us, False),  # longer than anything is kept: half of that time will do
        (990, day_us, False),
        (1100, day_us, True),
        (1390, 0, False),
        (1410, 0, True),
        (1410, 500_000_000, False),
        (1990, 60_000_000, True),
    ):
        monkeypatch.setattr(clocks, "unix_ns", lambda at=age_s: now_ns() + at * 1_000_000_000)
        found = await store.absent("acme", [name], needed_us)
        assert bool(found) is is_absent, (age_s, needed_us)
    monkeypatch.setattr(clocks, "unix_ns", lambda: now_ns() + 1_100_000_000_000)
    await store.put("acme", b"x")
    monkeypatch.setattr(clocks, "unix_ns", now_ns)
    assert await store.absent("acme", [name], day_us) == frozenset()


async def test_a_tenant_holds_no_more_than_its_share(bus: Bus, subjects: Subjects) -> None:
    config = ObjectStoreConfig(bucket=subjects.input_bucket, max_bytes=4_000_000)
    await bus.jetstream.create_object_store(subjects.input_bucket, config)
    store = InputStore(bus, subjects, SystemClock())
    await store.put("acme", b"x" * 600_000)
    for gateway in (store, InputStore(bus, subjects, SystemClock())):
        with pytest.raises(Refused, match=r"holds 600000 bytes .* allowed: 1000000") as full:
            await gateway.put("acme", b"y" * 500_000)
        assert full.value.reason == "INPUTS_FULL"
        await gateway.put("acme", b"x" * 600_000)  # the same again is no more
    await store.put("other", b"y" * 500_000)
    more = InputStore(bus, subjects, SystemClock(), tenant_bytes_max=1_200_000)
    await more.put("acme", b"y" * 500_000)


async def test_a_tenant_that_stalls_keeps_no_other_out(
    bus: Bus, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_AT_ONCE_OF_A_TENANT", 2)
    await bus.jetstream.create_object_store(subjects.input_bucket)
    door = Uploads(InputStore(bus, subjects, SystemClock()), 60.0)
    begun: list[str] = []

    async def pieces(tenant: str, stalls: bool) -> AsyncIterator[PutInputRequest]:
        yield PutInputRequest(header=InputHeader(tenant=tenant))
        begun.append(tenant)
        if stalls:
            await asyncio.Event().wait()
        yield PutInputRequest(data=saved(red(), "PNG"))

    def put(tenant: str, *, stalls: bool) -> asyncio.Task[object]:
        return asyncio.ensure_future(door.put(pieces(tenant, stalls), lambda asked: asked))

    stalled = [put("slow", stalls=True) for _ in range(3)]
    await until(lambda: begun.count("slow") == 2)
    waits = put("slow", stalls=False)
    assert (await put("quick", stalls=False)).name  # type: ignore[attr-defined]
    assert begun == ["slow", "slow", "quick"] and not waits.done()
    for task in stalled:
        task.cancel()
    await waits
    await asyncio.gather(*stalled, return_exceptions=True)
    assert not door._turns._here and not door._turns._of
    door.close()
