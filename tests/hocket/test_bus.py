"""The message plane against a real nats-server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import nats.errors
import pytest

from hocket.errors import BrokerUnavailable, PeerSilent, Refused, UnknownRequest
from hocket.launching.broker import free_port
from hocket.messaging.bus import Bus, Feed, Subjects
from hocket.v1.generation_pb2 import Progress
from hocket.v1.mesh_pb2 import LatentReply, LatentRequest, RequestEvent
from tests.brokers import running_broker
from tests.waiting import until

WAIT_S = 20.0


def event(number: int) -> RequestEvent:
    return RequestEvent(sequence=number, progress=Progress(step=number))


async def test_messages_come_in_order(bus: Bus, subjects: Subjects) -> None:
    feed = await bus.follow(subjects.event("r"), RequestEvent)
    for number in range(100):
        await bus.publish(subjects.event("r"), event(number))
    assert [(await feed.next()).sequence for _ in range(100)] == list(range(100))
    await feed.close()
    await feed.close()


async def test_a_full_feed_keeps_the_newest() -> None:
    feed: Feed[RequestEvent] = Feed(3)
    for number in range(5):
        feed.put(event(number))
    assert (feed.drops, feed.pending) == (2, 3)
    assert [(await feed.next()).sequence for _ in range(3)] == [2, 3, 4]


async def test_a_handler_gets_what_decodes(bus: Bus, subjects: Subjects) -> None:
    got: asyncio.Queue[RequestEvent] = asyncio.Queue()

    async def keep(message: RequestEvent) -> None:
        got.put_nowait(message)

    await bus.subscribe(subjects.event("r"), RequestEvent, keep)
    await bus.jetstream._nc.publish(subjects.event("r"), b"\xff\xff\xff")
    await bus.publish(subjects.event("r"), event(1))
    assert (await got.get()).sequence == 1
    assert bus.undecodable == 1


async def test_a_slow_answer_does_not_hold_up_the_next(bus: Bus, subjects: Subjects) -> None:
    release = asyncio.Event()

    async def answer(asked: LatentRequest) -> LatentReply:
        if asked.request_id == "slow":
            await release.wait()
        return LatentReply(key=asked.request_id)

    await bus.serve(subjects.latent("w0"), LatentRequest, answer)
    slow = asyncio.ensure_future(
        bus.request(subjects.latent("w0"), LatentRequest(request_id="slow"), LatentReply, 5_000_000)
    )
    quick = await bus.request(
        subjects.latent("w0"), LatentRequest(request_id="quick"), LatentReply, 5_000_000
    )
    assert quick.key == "quick" and not slow.done()
    release.set()
    assert (await slow).key == "slow"


async def test_nobody_there_is_a_silent_peer(bus: Bus, subjects: Subjects) -> None:
    with pytest.raises(PeerSilent):
        await bus.request(subjects.latent("w9"), LatentRequest(), LatentReply, 50_000)


async def test_no_broker_is_told_with_its_url() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    with pytest.raises(BrokerUnavailable) as caught:
        await Bus.connect(url, "test", timeout_s=0.1)
    assert caught.value.url == url


async def test_a_bug_in_a_handler_ends_whoever_awaits_it(bus: Bus, subjects: Subjects) -> None:
    """It used to be one line in the log, and the fact was lost."""

    async def broken(_: RequestEvent) -> None:
        raise AssertionError("a bug")

    await bus.subscribe(subjects.event("r"), RequestEvent, broken)
    await bus.publish(subjects.event("r"), event(1))
    with pytest.raises(AssertionError, match="a bug"):
        async with asyncio.timeout(WAIT_S):
            await bus.failed()


async def test_a_typed_error_of_a_handler_is_counted_and_ends_nothing(
    bus: Bus, subjects: Subjects, caplog: pytest.LogCaptureFixture
) -> None:
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def refusing(message: RequestEvent) -> None:
        seen.put_nowait(message.sequence)
        raise UnknownRequest("r")

    await bus.subscribe(subjects.event("r"), RequestEvent, refusing)
    with caplog.at_level(logging.WARNING):
        for number in range(8):
            await bus.publish(subjects.event("r"), event(number))
        async with asyncio.timeout(WAIT_S):
            assert [await seen.get() for _ in range(8)] == list(range(8))
    await until(lambda: bus.refused == 8)
    assert caplog.text.count("refused a message") == 1, "one line, not one each"


async def test_a_server_that_raises_answers_all_the_same(bus: Bus, subjects: Subjects) -> None:
    """The asker used to wait its whole time."""

    async def refusing(asked: LatentRequest) -> LatentReply:
        if asked.request_id == "bug":
            raise ZeroDivisionError
        raise UnknownRequest(asked.request_id)

    await bus.serve(subjects.latent("w0"), LatentRequest, refusing)
    for name, reason in (("r", "UNKNOWN_REQUEST"), ("bug", "INTERNAL")):
        with pytest.raises(Refused) as refused:
            asked = LatentRequest(request_id=name)
            await bus.request(subjects.latent("w0"), asked, LatentReply, int(WAIT_S * 1e6))
        assert refused.value.reason == reason
    with pytest.raises(ZeroDivisionError):
        await bus.failed()


async def test_a_request_that_cannot_be_read_is_answered(bus: Bus, subjects: Subjects) -> None:
    async def never(asked: LatentRequest) -> LatentReply:
        raise AssertionError(asked)

    await bus.serve(subjects.latent("w0"), LatentRequest, never)
    raw = await bus.jetstream._nc.request(subjects.latent("w0"), b"\xff\xff", timeout=WAIT_S)
    assert raw.headers == {"Hocket-Failure": "UNDECODABLE"} and bus.undecodable == 1


async def test_a_broker_that_stands_still_is_waited_for(tmp_path: Path) -> None:
    """A flush that was given up used to make the connection deaf: nats-py's reading ended when the
    answer came after all.
    """
    subjects = Subjects("still")
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "test")
        feed = await bus.follow(subjects.event("r"), RequestEvent)
        assert await bus.flush()
        broker.stand_still()
        assert not await bus.flush(0.05) and not await bus.flush(0.05)
        await bus.publish(subjects.event("r"), event(1))
        broker.go_on()
        async with asyncio.timeout(WAIT_S):
            assert (await feed.next()).sequence == 1
            assert await bus.flush(WAIT_S)
            await bus.publish(subjects.event("r"), event(2))
            assert (await feed.next()).sequence == 2
        await bus.close()


async def test_closing_does_not_wait_for_a_broker_that_stands_still(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "test")
        broker.stand_still()
        for number in range(2000):  # more than the kernel takes
            message = RequestEvent(progress=Progress(node="n" * 10_000, step=number))
            await bus.publish("x", message)
        assert bus.drops, "more than is kept for a broker that takes nothing"
        async with asyncio.timeout(WAIT_S):
            await bus.close()


async def test_of_several_brokers_one_that_answers_is_taken(nats_url: str) -> None:
    gone = f"nats://127.0.0.1:{free_port()}"
    bus = await Bus.connect(f"{gone}, {nats_url}", "test")
    assert await bus.flush()
    await bus.close()


class _SilentClient:
    """A connection whose pings are never answered, or break."""

    is_connected = True

    def __init__(self, ends: BaseException | None = None) -> None:
        self._ends = ends

    def jetstream(self, timeout: float) -> None:
        """Nobody asks it anything."""

    async def flush(self, timeout: float) -> None:
        if self._ends is not None:
            raise self._ends
        await asyncio.Event().wait()


async def test_a_broker_that_never_answered_has_seen_nothing() -> None:
    for end in (OSError("reset"), nats.errors.FlushTimeoutError()):
        assert not await Bus(_SilentClient(end)).flush()  # type: ignore[arg-type]
    bus = Bus(_SilentClient())  # type: ignore[arg-type]
    flushing = asyncio.ensure_future(bus.flush())
    await asyncio.sleep(0)
    await bus._on_reconnect()  # the ping went with the old connection
    assert not await flushing


async def test_what_no_subject_can_be_is_dropped_and_counted(bus: Bus, subjects: Subjects) -> None:
    for name in ("a b", "a\r\nb"):
        await bus.publish(subjects.cluster + ".x." + name, event(1))
    assert bus.drops == 2 and await bus.flush()
