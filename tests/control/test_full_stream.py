"""A promises stream without room: what gives way, what waits, and who still leads."""

from __future__ import annotations

import asyncio
import logging

import pytest

from control.leading.promises import Deposed, open_stream
from hocket.errors import Refused
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import Log, LogFull
from tests.control.made import book_of, ended, promised, taken

WAIT_S = 30.0


async def test_a_full_stream_forgets_what_has_ended_and_then_refuses(
    bus: Bus, subjects: Subjects
) -> None:
    stream = await open_stream(bus, subjects, bytes_max=20_000)
    promises = await taken(stream, subjects, 1)
    for i in range(20):
        await promises.append(ended(f"e{i}"))
    with pytest.raises(Refused) as refused:
        for i in range(200):
            await promises.append(promised(f"r{i}"))
    assert refused.value.reason == "QUEUE_FULL" and refused.value.retry_after_us
    book = await book_of(stream, subjects)
    assert len(book.open) > 20 and not book.ended
    await promises.append(ended("r0"))
    assert "r0" in (await book_of(stream, subjects)).ended, "there is room for an end"


async def _full(stream: Log, subjects: Subjects) -> None:
    """No byte is left, whoever kept some for what."""
    size = 4000
    for number in range(1000):
        try:
            await stream.append(subjects.promise(f"x{number}"), b"\xff" * size)
        except LogFull:
            if size < 10:
                return
            size //= 2
    raise AssertionError("there is still room")


async def test_a_new_leader_takes_a_full_stream_over(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects, bytes_max=40_000)
    old = await taken(stream, subjects, 1)
    await _full(stream, subjects)
    async with asyncio.timeout(WAIT_S):
        new = await taken(stream, subjects, 2)
    assert new.term == 2 and await new.is_ours()
    with pytest.raises(Deposed):
        await old.append(ended("a"))


async def _full_of(stream: Log, subjects: Subjects, *, has_ended: bool) -> list[str]:
    """As an older version left it, which kept nothing back: no Fence, and no byte left. Says what
    is there.
    """
    filler, stored = "x" * 800, []
    for number in range(1000):
        promise = ended(f"r{number}") if has_ended else promised(f"r{number}")
        promise.submit.request.spec.workflow = filler
        try:
            await stream.append(subjects.promise(f"r{number}"), promise.SerializeToString())
            stored.append(f"r{number}")
        except LogFull:
            if len(filler) < 4:
                return stored
            filler = filler[: len(filler) // 2]
    raise AssertionError("there is still room")


async def test_fences_have_room_in_a_stream_that_an_older_version_left_full(
    bus: Bus, subjects: Subjects
) -> None:
    """What ended first is forgotten for them; nothing that is open goes."""
    stream = await open_stream(bus, subjects, bytes_max=60_000)
    async with asyncio.timeout(WAIT_S):
        await stream.append(subjects.promise("open"), promised("open").SerializeToString())
        kept = await _full_of(stream, subjects, has_ended=True)
        promises = await taken(stream, subjects, 1)
    book = await book_of(stream, subjects)
    assert set(book.open) == {"open"}
    assert book.ended and list(book.ended) == kept[-len(book.ended) :], "the oldest went"
    promises.restore(book.ended)
    await promises.append(ended("open"))


async def test_fences_have_room_in_a_stream_that_was_made_smaller(
    bus: Bus, subjects: Subjects
) -> None:
    stream = await open_stream(bus, subjects, bytes_max=60_000)
    await _full_of(stream, subjects, has_ended=True)
    await open_stream(bus, subjects, bytes_max=30_000)
    async with asyncio.timeout(WAIT_S):
        promises = await taken(stream, subjects, 1)
        promises.restore((await book_of(stream, subjects)).ended)
        await promises.append(promised("a"))
        await promises.append(ended("a"))
    told = await stream.room_and_bound()
    assert told is not None and told[0] >= 0


async def test_a_stream_full_of_open_requests_says_what_helps(
    bus: Bus, subjects: Subjects, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it may go: it waits for room, and takes it when there is some."""
    stream = await open_stream(bus, subjects, bytes_max=60_000)
    caplog.set_level(logging.WARNING)
    kept = await _full_of(stream, subjects, has_ended=False)
    taking = asyncio.ensure_future(taken(stream, subjects, 1))
    async with asyncio.timeout(WAIT_S):
        while "promises_bytes_max" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not taking.done()
        await open_stream(bus, subjects, bytes_max=120_000)
        await taking
    assert list((await book_of(stream, subjects)).open) == kept


async def test_an_end_waits_for_room_and_nothing_goes_for_it(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects, bytes_max=40_000)
    promises = await taken(stream, subjects, 1)
    await promises.append(promised("a"))
    await _full(stream, subjects)
    larger = ended("a")
    larger.ended.failed.message = "x" * 3000
    ending = asyncio.ensure_future(promises.append(larger))
    with pytest.raises(Refused):
        await promises.append(promised("b"))
    await asyncio.wait({ending}, timeout=0.5)
    assert not ending.done() and set((await book_of(stream, subjects)).open) == {"a"}
    await stream.purge(subjects.promise("x0"))
    async with asyncio.timeout(WAIT_S):
        await ending
    assert set((await book_of(stream, subjects)).ended) == {"a"}


async def test_ends_and_wishes_have_room_where_promises_have_none(
    bus: Bus, subjects: Subjects
) -> None:
    stream = await open_stream(bus, subjects, bytes_max=100_000)
    promises = await taken(stream, subjects, 1)
    with pytest.raises(Refused):
        for number in range(1000):
            await promises.append(promised(f"r{number}"))
    told = await stream.room_and_bound()
    assert told is not None and told[0] >= 5_000
    async with asyncio.timeout(WAIT_S):
        await promises.drain("w0", True)
        await promises.append(ended("r0"))
        await promises.forget("r0")
        await taken(stream, subjects, 2)
