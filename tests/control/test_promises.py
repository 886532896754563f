"""The promises stream on a real nats-server: fenced, settled, bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from control.leading.promises import LANES, Deposed, Promises, open_stream
from control.leading.standby import Book, Standby
from hocket.errors import WrongConfig
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.deliveries import StreamEntry
from hocket.messaging.stores import EntryTooLarge, Log, OutcomeUnknown
from hocket.v1 import journal_pb2
from tests.brokers import running_broker
from tests.control.made import PROMPT, book_of, ended, promised, taken

WAIT_S = 30.0
TRY_S = 0.2  # an append that is not answered for so long is tried again


async def test_a_deposed_leader_promises_nothing_more(bus: Bus, subjects: Subjects) -> None:
    """Not even what was under way: it used to go on until a heartbeat told it of the other one."""
    stream = await open_stream(bus, subjects)
    old = await taken(stream, subjects, 1)
    await old.append(promised("a"))
    new = await taken(stream, subjects, 2)
    results = await asyncio.gather(
        *(old.append(promised(f"b{i}")) for i in range(50)),
        old.append(ended("a")),
        old.forget("a"),
        old.drain("w0", True),
        return_exceptions=True,
    )
    assert all(isinstance(r, Deposed) and (r.term, r.by) == (1, 2) for r in results), results
    assert not await old.is_ours() and await new.is_ours()
    await new.append(promised("c"))
    book = await book_of(stream, subjects)
    assert set(book.open) == {"a", "c"} and not book.ended and not book.draining


async def test_two_new_leaders_at_once_have_two_terms(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    found = await asyncio.gather(
        *(taken(stream, subjects, 5) for _ in range(6)), return_exceptions=True
    )
    taking = [promises for promises in found if isinstance(promises, Promises)]
    assert taking and len(taking) + sum(isinstance(f, Deposed) for f in found) == 6, found
    assert len({promises.term for promises in taking}) == len(taking)
    assert [await promises.is_ours() for promises in taking].count(True) == 1


async def test_a_term_is_above_every_earlier_one(bus: Bus, subjects: Subjects) -> None:
    """Also where the key's revisions began anew."""
    stream = await open_stream(bus, subjects)
    assert (await taken(stream, subjects, 70)).term == 70
    assert (await taken(stream, subjects, 3)).term == 71


async def test_what_has_ended_keeps_no_prompt_and_no_workflow(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    promises = await taken(stream, subjects, 1)
    opened, over = promised("a"), ended("a")
    for promise in (opened, over):
        promise.submit.workflow.name = "its-workflow"
    stamp_us = await promises.append(opened)
    stored = await stream.newest(subjects.promise("a"))
    assert stored is not None and PROMPT.encode() in stored.data
    assert b"its-workflow" in stored.data
    assert abs(stored.unix_us - stamp_us) < WAIT_S * 1e6
    await promises.append(over)
    stored = await stream.newest(subjects.promise("a"))
    assert stored is not None and PROMPT.encode() not in stored.data
    assert b"its-workflow" not in stored.data


async def test_a_failure_that_no_broker_takes_is_shortened(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    promises = await taken(stream, subjects, 1)
    promise = ended("a")
    promise.ended.failed.reason = "MODEL_ERROR"
    promise.ended.failed.message = "x" * (2 << 20)
    await promises.append(promise)
    with pytest.raises(EntryTooLarge):
        promise = promised("b")
        promise.submit.request.spec.prompt = "x" * (2 << 20)
        await promises.append(promise)
    kept = (await book_of(stream, subjects)).ended["a"].promise.ended
    assert kept.failed.reason == "MODEL_ERROR" and len(kept.failed.message) > 1000


async def test_the_oldest_ended_requests_go_first(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    promises = await taken(stream, subjects, 1, ended_max=3)
    promises.restore(["x0"])
    await promises.append(promised("open"))
    keeping = asyncio.ensure_future(promises.keep_bounds())
    for i in range(6):
        await promises.append(ended(f"r{i}"))
    async with asyncio.timeout(WAIT_S):
        while set((await book_of(stream, subjects)).ended) != {"r3", "r4", "r5"}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    keeping.cancel()
    assert set((await book_of(stream, subjects)).open) == {"open"}


async def test_ended_requests_go_after_the_retention(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    promises = await taken(stream, subjects, 1, retention_s=1.0)
    await promises.append(promised("open"))
    await promises.append(ended("a"))
    async with asyncio.timeout(WAIT_S):
        while await stream.newest(subjects.promise("a")) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    book = await book_of(stream, subjects)
    assert set(book.open) == {"open"} and not book.ended


async def test_too_little_space_names_the_setting(bus: Bus, subjects: Subjects) -> None:
    """It used to end in a traceback where there was less than 1 GiB."""
    with pytest.raises(WrongConfig) as wrong:
        await open_stream(bus, subjects, bytes_max=1 << 50)
    assert "promises_bytes_max" in str(wrong.value)


async def test_without_a_setting_it_takes_what_there_is(tmp_path: Path) -> None:
    subjects = Subjects("small")
    config = tmp_path / "nats.conf"
    config.write_text("jetstream { max_file_store: 100M }\n")
    with running_broker(tmp_path, "-c", str(config)) as broker:
        bus = await Bus.connect(broker.url, "test")
        stream = await open_stream(bus, subjects)
        size = await stream.bytes_max()
        assert size is not None and 16 << 20 <= size <= 100_000_000
        assert await (await open_stream(bus, subjects)).bytes_max() == size
        await bus.close()


async def test_appends_outlast_a_broker_that_stands_still(tmp_path: Path) -> None:
    """Tried again and again, stored once each, and answered only then."""
    subjects = Subjects("still")
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "test")
        await open_stream(bus, subjects)
        stream = Log(bus, subjects.promises_stream, TRY_S)
        promises = await taken(stream, subjects, 1)
        broker.stand_still()
        work = [asyncio.ensure_future(promises.append(promised(f"r{i}"))) for i in range(20)]
        done, _ = await asyncio.wait(work, timeout=3 * TRY_S)
        assert not done
        broker.go_on()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*work)
        assert await stream.last_sequence() == LANES + 20, "Fences, and each once"
        assert len((await book_of(stream, subjects)).open) == 20
        await bus.close()


async def test_appends_outlast_a_broker_that_dies(tmp_path: Path) -> None:
    subjects = Subjects("dies")
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "test")
        await open_stream(bus, subjects)
        stream = Log(bus, subjects.promises_stream, TRY_S)
        promises = await taken(stream, subjects, 1)
        await promises.append(promised("before"))
        broker.kill()
        work = [asyncio.ensure_future(promises.append(promised(f"r{i}"))) for i in range(20)]
        await broker.start_again()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*work)
        assert len((await book_of(stream, subjects)).open) == 21 and await promises.is_ours()
        await bus.close()


async def test_an_append_of_unknown_outcome_counts_if_it_was_stored(tmp_path: Path) -> None:
    """Its answer was lost, and meanwhile another leader took over: it stands before the Fence, so
    that the new leader knows of it.
    """
    subjects = Subjects("unknown")
    with running_broker(tmp_path) as broker:
        bus, other = [await Bus.connect(broker.url, "test") for _ in range(2)]
        stream = await open_stream(bus, subjects)
        deaf = _Deaf(bus, subjects.promises_stream)
        promises = await taken(deaf, subjects, 1)
        deaf.answers_lost = 2
        one, two = (asyncio.ensure_future(promises.append(promised(r))) for r in ("a", "b"))
        await deaf.lost.wait()
        await taken(Log(other, subjects.promises_stream), subjects, 2)
        deaf.may_go_on.set()
        async with asyncio.timeout(WAIT_S):
            assert await one and await two
            with pytest.raises(Deposed):
                await promises.append(promised("c"))
        assert set((await book_of(stream, subjects)).open) == {"a", "b"}
        await bus.close()
        await other.close()


class _Deaf(Log):
    """A stream whose first answers get lost."""

    answers_lost = 0
    lost: asyncio.Event
    may_go_on: asyncio.Event

    def __init__(self, bus: Bus, name: str) -> None:
        super().__init__(bus, name)
        self.lost, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def append(self, subject: str, data: bytes, **how: object) -> int:
        number = await super().append(subject, data, **how)  # type: ignore[arg-type]
        if self.answers_lost:
            self.answers_lost -= 1
            if not self.answers_lost:
                self.lost.set()
            await self.may_go_on.wait()
            raise OutcomeUnknown(subject, "lost")
        return number


async def test_a_standby_has_the_streams_state(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    first = await taken(stream, subjects, 1)
    await first.append(promised("before"))
    standby = Standby(stream, subjects)
    following = asyncio.ensure_future(standby.run())
    await first.append(promised("a"))
    await first.append(promised("b"))
    await first.append(ended("a"))
    await first.append(ended("gone"))
    await first.forget("gone")
    await first.drain("gpu.example.com-0", True)
    await first.drain("w1", True)
    await first.drain("w1", False)
    async with asyncio.timeout(WAIT_S):
        second = await taken(stream, subjects, 2)
        book = await standby.complete(second.fence.sequence)
    following.cancel()
    assert set(book.open) == {"before", "b"} and set(book.ended) == {"a"}
    assert book.draining == {"gpu.example.com-0"}
    assert len(book) == await stream.count()
    again = await book_of(stream, subjects)
    assert (again.open, again.ended, again.draining) == (book.open, book.ended, book.draining)


async def test_a_standby_that_hears_nothing_reads_anew(bus: Bus, subjects: Subjects) -> None:
    stream = await open_stream(bus, subjects)
    promises = await taken(stream, subjects, 1)
    await promises.append(promised("a"))
    standby = Standby(stream, subjects)  # nobody runs it
    async with asyncio.timeout(WAIT_S):
        book = await standby.complete(promises.fence.sequence)
    assert set(book.open) == {"a"}


def test_a_book_leaves_out_what_is_too_old_or_unreadable(
    subjects: Subjects, caplog: pytest.LogCaptureFixture
) -> None:
    book = Book(subjects)
    for number, name in enumerate("abc", 1):
        data = ended(name).SerializeToString()
        book.take(StreamEntry(subjects.promise(name), data, number, number * 1_000_000))
    book.take(StreamEntry(subjects.promise("odd"), b"\xff\xff", 4, 4_000_000))
    assert "left out" in caplog.text and len(book.ended) == 3
    book.prune(unix_us=4_000_000, retention_us=2_500_000, ended_max=9)
    assert set(book.ended) == {"b", "c"}
    book.prune(unix_us=4_000_000, retention_us=2_500_000, ended_max=1)
    assert set(book.ended) == {"c"}


async def test_ages_are_the_brokers_stamps(bus: Bus, subjects: Subjects) -> None:
    """This host's wall clock does not come into it."""
    stream = await open_stream(bus, subjects)
    promises = await taken(stream, subjects, 1)
    await promises.append(promised("a"))
    stored = await stream.newest(subjects.promise("a"))
    later = await taken(stream, subjects, 2)
    assert stored is not None
    age_us = later.fence.unix_us - stored.unix_us
    fenced_us = later.at_us(later.fence.unix_us)
    assert age_us >= 0 and later.at_us(stored.unix_us) == fenced_us - age_us
    assert journal_pb2.Fence.FromString(later.fence.data).term == 2
