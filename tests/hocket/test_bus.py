"""The message plane against a real nats-server."""

from __future__ import annotations

import asyncio

import pytest

from hocket.broker import free_port
from hocket.bus import Bus, Feed, Subjects
from hocket.errors import BrokerUnavailable, PeerSilent
from hocket.v1.generation_pb2 import Progress
from hocket.v1.mesh_pb2 import LatentReply, LatentRequest, RequestEvent


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
