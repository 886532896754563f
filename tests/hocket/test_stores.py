"""Streams and expiring keys on a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.deliveries import StreamEntry
from hocket.messaging.stores import (
    AppendCondition,
    LeasedKey,
    Log,
    LogFull,
    LogMoved,
    LogShape,
    NoRoom,
)

WAIT_S = 20.0


@pytest.fixture
async def log(bus: Bus, subjects: Subjects) -> Log:
    return await Log.open(bus, shape(subjects))


def shape(subjects: Subjects, bytes_max: int = -1) -> LogShape:
    name = subjects.promises_stream
    return LogShape(name, (subjects.promises,), bytes_max=bytes_max, newest_only=True)


async def listed(entries: AsyncIterator[StreamEntry]) -> list[tuple[str, bytes]]:
    return [(entry.subject.rpartition(".")[2], entry.data) async for entry in entries]


async def test_appends_under_way_at_once_are_stored_in_order(log: Log, subjects: Subjects) -> None:
    numbers = await asyncio.gather(
        *(log.append(subjects.promise(f"r{i}"), b"x", after=i) for i in range(100))
    )
    assert numbers == list(range(1, 101)) and await log.last_sequence() == 100
    with pytest.raises(LogMoved) as moved:
        await log.append(subjects.promise("late"), b"x", after=99)
    assert moved.value.last == 100


async def test_a_guard_refuses_whoever_has_not_seen_the_newest_fence(
    log: Log, subjects: Subjects
) -> None:
    """However many appends are under way: a counted sequence could match by chance."""
    fence = subjects.fence(0)
    first = await log.append(fence, b"1", guard=AppendCondition(fence, 0))
    old = AppendCondition(fence, first)
    await log.append(subjects.promise("a"), b"open", guard=old, message_id="1-1")
    await log.append(fence, b"2", guard=old)
    results = await asyncio.gather(
        *(log.append(subjects.promise(f"b{i}"), b"", guard=old) for i in range(20)),
        return_exceptions=True,
    )
    assert all(isinstance(result, LogMoved) for result in results)
    assert await listed(log.read(subjects.promises)) == [("a", b"open"), ("0", b"2")]


async def test_a_repeated_message_is_stored_once(log: Log, subjects: Subjects) -> None:
    again = [await log.append(subjects.promise("a"), b"1", message_id="7") for _ in range(3)]
    assert again == [1, 1, 1] and await log.last_sequence() == 1


async def test_read_gives_the_newest_of_each_subject(log: Log, subjects: Subjects) -> None:
    assert await listed(log.read(subjects.promises)) == []
    for name, data in (("a", b"1"), ("b", b"1"), ("a", b"2")):
        await log.append(subjects.promise(name), data)
    assert await listed(log.read(subjects.promises)) == [("b", b"1"), ("a", b"2")]
    newest = await log.newest(subjects.promise("a"))
    assert newest is not None and (newest.data, newest.sequence) == (b"2", 3)
    stamps = [entry.unix_us async for entry in log.read(subjects.promises)]
    assert stamps[-1] == newest.unix_us and stamps == sorted(stamps)
    await log.purge(subjects.promise("a"))
    assert await log.newest(subjects.promise("a")) is None and await log.last_sequence() == 3


async def test_follow_goes_on_behind_a_number(log: Log, subjects: Subjects) -> None:
    for name in "abc":
        await log.append(subjects.promise(name), name.encode())
    async with asyncio.timeout(WAIT_S):
        feed = await log.follow(after=1)
        assert [(await feed.next()).data for _ in range(2)] == [b"b", b"c"]
        await log.append(subjects.promise("d"), b"d")
        assert (await feed.next()).sequence == 4
    await feed.close()


async def test_an_entry_with_a_time_to_live_goes(log: Log, subjects: Subjects) -> None:
    await log.append(subjects.promise("a"), b"", ttl_s=1.0)
    await log.append(subjects.promise("b"), b"")
    async with asyncio.timeout(WAIT_S):
        while await log.newest(subjects.promise("a")) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await log.newest(subjects.promise("b")) is not None, "the other one stays"


async def test_a_full_stream_refuses_and_drops_nothing(bus: Bus, subjects: Subjects) -> None:
    log = await Log.open(bus, shape(subjects, bytes_max=4096))
    with pytest.raises(LogFull):
        for i in range(100):
            await log.append(subjects.promise(f"r{i}"), b"x" * 500)
    assert (await log.newest(subjects.promise("r0"))) is not None


async def test_a_broker_without_room_says_so_by_type(bus: Bus, subjects: Subjects) -> None:
    with pytest.raises(NoRoom) as caught:
        await Log.open(bus, shape(subjects, bytes_max=1 << 50))
    assert caught.value.wanted_bytes == 1 << 50


async def test_a_stream_that_is_not_there_is_no_traceback(bus: Bus, subjects: Subjects) -> None:
    log = Log(bus, subjects.promises_stream)
    assert await log.last_sequence() == 0 and await listed(log.read(subjects.promises)) == []


async def test_a_cell_has_one_owner_and_expires(bus: Bus, subjects: Subjects) -> None:
    cell = await LeasedKey.open(bus, subjects.leader_bucket, "leader", ttl_s=1.0)
    other = LeasedKey(bus, subjects.leader_bucket, "leader")
    watch = await other.watch()
    async with asyncio.timeout(WAIT_S):
        assert await watch.next() is None and await cell.get() is None
        first = await cell.create(b"a")
        assert first is not None and await other.create(b"b") is None
        second = await cell.update(b"a2", first)
        assert second is not None and second > first and await cell.update(b"a3", first) is None
        assert [await watch.next() for _ in range(2)] == [b"a", b"a2"]
        assert await watch.next() is None, "nobody renewed it"
        third = await other.create(b"b")
        assert third is not None and third > second and await watch.next() == b"b"
        assert not await cell.delete(second) and await other.delete(third)
        assert await watch.next() is None and await cell.create(b"c") is not None
    await watch.close()
