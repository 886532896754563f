"""The simulated world itself: time, processes, wires, the broker's rules."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import pytest

from bench.shell.loop import Deadlock, SimulatedLoop, SimulatedProcess
from bench.shell.messaging.broker import Broker, Connection, Stream, WrongLast, matcher
from bench.shell.messaging.client import Client, Received
from bench.shell.messaging.jetstream import JetStream
from bench.shell.waits import SimulatedClock
from bench.shell.wire import Weather, Wire
from hocket.messaging.bus import Bus
from hocket.messaging.deliveries import Broken, Delivery, _numbers
from hocket.messaging.stores import (
    AppendCondition,
    LeasedKey,
    Log,
    LogMoved,
    LogShape,
    OutcomeUnknown,
)

T = TypeVar("T")


def run(work: Callable[[SimulatedLoop], Coroutine[Any, Any, T]]) -> T:
    loop = SimulatedLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_time_jumps_to_the_next_timer() -> None:
    async def sleeps(loop: SimulatedLoop) -> int:
        began_us = loop.now_us
        await asyncio.gather(asyncio.sleep(3600.0), asyncio.sleep(1.5))
        return loop.now_us - began_us

    assert run(sleeps) == 3_600_000_000


def test_who_waits_for_nothing_is_found() -> None:
    async def waits(loop: SimulatedLoop) -> None:
        await loop.create_future()

    with pytest.raises(Deadlock):
        run(waits)


def test_a_stopped_process_runs_nothing_until_it_goes_on() -> None:
    async def course(loop: SimulatedLoop) -> list[int]:
        process, seen = loop.process("p"), list[int]()

        async def ticks() -> None:
            clock = SimulatedClock(loop)
            for _ in range(4):
                await clock.sleep_until(clock.now_us() + 1_000_000)
                seen.append(loop.now_us - loop.start_us)

        process.start(ticks())
        await asyncio.sleep(1.5)
        process.stop()
        await asyncio.sleep(5.0)
        process.resume()
        await asyncio.sleep(3.0)
        return seen

    assert run(course) == [1_000_000, 6_500_000, 7_500_000, 8_500_000]


def test_a_killed_process_says_nothing_more() -> None:
    async def course(loop: SimulatedLoop) -> tuple[int, list[bytes], int]:
        broker = Broker(loop, random.Random(0), Weather())
        one, other = loop.process("one"), loop.process("other")
        heard: list[bytes] = []
        here, there = Client(broker, one, "one"), Client(broker, other, "other")

        async def hear(message: Received) -> None:
            heard.append(message.data)

        async def listens() -> None:
            await here.connect()
            await here.subscribe("news", cb=hear)

        async def speaks() -> None:
            await there.connect()
            try:
                await there.publish("news", b"first")
                await asyncio.sleep(100.0)
            finally:
                await there.publish("news", b"last words")

        await one.start(listens())
        await asyncio.sleep(0.1)
        other.start(speaks())
        await asyncio.sleep(0.1)
        left = await other.kill()
        await asyncio.sleep(0.1)
        return left, heard, len(broker.connections)

    assert run(course) == (0, [b"first"], 1)


def test_a_wire_keeps_its_order_in_bad_weather() -> None:
    async def course(loop: SimulatedLoop) -> list[int]:
        weather = Weather(slow=0.5, slow_us=1_000_000)
        wire, got = Wire(loop, random.Random(3), weather), list[int]()
        for number in range(50):
            wire.send(partial(got.append, number))
        await asyncio.sleep(60.0)
        return got

    assert run(course) == list(range(50))


def test_a_stream_keeps_its_rules() -> None:
    async def course(loop: SimulatedLoop) -> list[object]:
        broker = Broker(loop, random.Random(0), Weather())
        stream = broker.stream("s", lambda: Stream(("a.*",), one_a_subject=True, marks=True))
        broker.append(stream, "a.x", b"1")
        broker.append(stream, "a.x", b"2", ttl_us=1_000_000)
        with pytest.raises(WrongLast):
            broker.append(stream, "a.y", b"3", guard=("a.x", 1))
        broker.append(stream, "a.y", b"3", guard=("a.x", 2))
        stored = [(m.subject, m.data, m.sequence) for m in stream.messages.values()]
        await asyncio.sleep(2.0)
        newest = stream.get("a.x")
        return [stored, newest.data if newest is not None else None]

    assert run(course) == [[("a.x", b"2", 2), ("a.y", b"3", 3)], b""]


async def _bus(loop: SimulatedLoop, broker: Broker) -> tuple[SimulatedProcess, Bus]:
    process = loop.process("p")

    async def connects() -> Bus:
        client = Client(broker, process, "p")
        client.jetstream_of = JetStream
        untyped: Any = client
        bus = Bus(untyped)
        await client.connect()
        return bus

    return process, await process.start(connects())


def test_the_stores_run_on_it_as_they_do_on_the_real_one() -> None:
    async def course(loop: SimulatedLoop) -> list[object]:
        broker = Broker(loop, random.Random(0), Weather())
        process, bus = await _bus(loop, broker)

        async def uses() -> list[object]:
            log = await Log.open(bus, LogShape("s", ("a.>",), newest_only=True))
            first = await log.append("a.fence", b"one")
            await log.append("a.r1", b"open", guard=AppendCondition("a.fence", first))
            second = await log.append("a.fence", b"two", guard=AppendCondition("a.fence", first))
            with pytest.raises(LogMoved):
                await log.append("a.r2", b"late", guard=AppendCondition("a.fence", first))
            again = await log.append("a.r3", b"once", message_id="m1")
            repeated = await log.append("a.r3", b"once", message_id="m1")
            read = [(e.subject, e.data) async for e in log.read("a.>")]
            cell = await LeasedKey.open(bus, "b", "leader", ttl_s=3.0)
            revision = await cell.create(b"me")
            refused = await cell.create(b"you")
            await asyncio.sleep(5.0)
            return [second, again == repeated, read, revision, refused, await cell.get()]

        return await process.start(uses())

    second, same, read, revision, refused, left = run(course)
    assert (second, same, revision, refused, left) == (3, True, 1, None, None)
    assert read == [("a.r1", b"open"), ("a.fence", b"two"), ("a.r3", b"once")]


def test_an_answer_that_is_lost_leaves_the_outcome_unknown() -> None:
    async def course(loop: SimulatedLoop) -> tuple[str, int]:
        weather = Weather()
        broker = Broker(loop, random.Random(0), weather)
        process, bus = await _bus(loop, broker)

        async def uses() -> str:
            log = await Log.open(bus, LogShape("s", ("a",)))
            weather.lost_answer = 1.0
            try:
                await log.append("a", b"one")
            except OutcomeUnknown as error:
                return type(error).__name__
            return "stored"

        return await process.start(uses()), len(broker.all_of("s"))

    assert run(course) == ("OutcomeUnknown", 1)


def _read_one(disturb: Callable[[SimulatedProcess, Connection], None]) -> tuple[str, int]:
    """What comes of reading a delivery that is disturbed, and after how many µs."""

    async def course(loop: SimulatedLoop) -> tuple[str, int]:
        broker = Broker(loop, random.Random(0), Weather())
        process, bus = await _bus(loop, broker)

        async def reads() -> tuple[str, int]:
            await Log.open(bus, LogShape("s", ("a",)))
            delivery = await Delivery.open(bus, "s", "a")
            disturb(process, broker.connections[0])
            began_us = loop.now_us
            try:
                entry, _ = await delivery.next()
                found = entry.data.decode()
            except Broken as broken:
                found = broken.cause
            await delivery.close()
            return found, loop.now_us - began_us

        reading = process.start(reads())
        await asyncio.sleep(7.0)
        broker.append(broker.streams["s"], "a", b"one")
        await asyncio.sleep(3.0)
        process.resume()
        return await reading

    return run(course)


def test_a_delivery_is_waited_for_as_long_as_its_heart_beats() -> None:
    found, after_us = _read_one(lambda process, connection: None)
    assert (found, after_us // 1_000_000) == ("one", 6)


def test_a_delivery_that_falls_silent_is_broken() -> None:
    found, after_us = _read_one(lambda process, connection: connection.hold())
    assert (found, after_us) == ("the delivery fell silent", 3_000_000)


def test_what_came_while_a_process_stood_still_was_no_silence() -> None:
    found, after_us = _read_one(lambda process, connection: process.stop())
    assert (found, after_us // 1_000_000) == ("one", 9)


@pytest.mark.parametrize(
    "reply",
    ["$JS.ACK.s.c.1.7.3.5000.2", "$JS.ACK._.account.s.c.1.7.3.5000.2.token"],
)
def test_a_delivery_tells_its_numbers(reply: str) -> None:
    assert _numbers(reply) == (7, 3, 5000, 2)


@pytest.mark.parametrize("reply", ["anybody", "$JS.ACK.s.c.1.x.3.5000.2", "$JS.ACK.s.c.1.7.3"])
def test_a_reply_that_no_delivery_has_breaks_it(reply: str) -> None:
    with pytest.raises(Broken):
        _numbers(reply)


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        (">", ("a", "a.b"), ()),
        ("a.b", ("a.b",), ("a", "a.b.c", "a.bc")),
        ("a.>", ("a.b", "a.b.c"), ("a", "a.", "ab.c")),
        ("a.*.c", ("a.b.c",), ("a.c", "a.b.b.c", "a.b.d")),
        ("*.b.>", ("a.b.c", "a.b.c.d"), ("a.b", "a.c.b")),
    ],
)
def test_wildcards(pattern: str, fitting: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert all(map(matcher(pattern), fitting))
    assert not any(map(matcher(pattern), other))
