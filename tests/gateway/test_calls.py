"""The use cases without gRPC's server: a line in memory, a clock that a test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import pytest
from opentelemetry.trace import NoOpTracer

from gateway import wish
from gateway.calls import Calls
from gateway.line import GATHER_US
from hocket.client import request
from hocket.errors import NotFinished, UnknownRequest
from hocket.v1.control_pb2 import (
    AttachResponse,
    Followed,
    ListRequestsRequest,
    ListRequestsResponse,
    RequestStatus,
)
from hocket.v1.generation_pb2 import Accepted, Finished, GenerateRequest, MediaChunk, ModelInfo
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import MediaInfo
from tests.gateway.links import Wire, wired
from tests.gateway.peer import EMOJI

SECOND_US = 1_000_000


@dataclass
class Shelf:
    """Control's answers to single questions, and results, in memory."""

    statuses: dict[str, RequestStatus] = field(default_factory=dict)
    pieces: tuple[bytes, ...] = (b"one", b"two")

    @property
    def models(self) -> Sequence[ModelInfo]:
        return (EMOJI,)

    listed = models

    async def get(self, request_id: str, tenant: str | None) -> RequestStatus:
        if request_id not in self.statuses:
            raise UnknownRequest(request_id)
        return self.statuses[request_id]

    async def cancel(self, request_id: str, tenant: str | None) -> bool:
        return True

    async def delete(self, request_id: str, tenant: str | None) -> None:
        del self.statuses[request_id]

    async def list(self, request: ListRequestsRequest) -> ListRequestsResponse:
        return ListRequestsResponse(requests=self.statuses.values())

    async def chunks(self, media: MediaInfo, offset: int = 0) -> AsyncIterator[MediaChunk]:
        for piece in self.pieces:
            yield MediaChunk(data=piece)


@dataclass
class Table:
    """What a test of the use cases plays with."""

    wire: Wire
    calls: Calls
    shelf: Shelf


@asynccontextmanager
async def set_up(broker_away: bool = False) -> AsyncIterator[Table]:
    shelf = Shelf()
    async with wired("a") as wire:
        calls = Calls(
            line=wire.line,
            control=shelf,
            media=shelf,
            clock=wire.clock,
            tracer=NoOpTracer(),
            submit_wait_us=2 * SECOND_US,
            broker_away=lambda: broker_away,
        )
        yield Table(wire, calls, shelf)


@asynccontextmanager
async def stalled_calls(broker_away: bool) -> AsyncIterator[Calls]:
    """Control lives, and answers nothing; time passes by itself."""

    async def beat(wire: Wire) -> None:
        while True:
            wire.link.say()
            await wire.pass_us(SECOND_US)

    async with set_up(broker_away) as table:
        beating = asyncio.ensure_future(beat(table.wire))
        yield table.calls
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


def ending(name: str, sequence: int = 9) -> RequestEvent:
    finished = Finished(media=MediaInfo(object_name=name, size_bytes=6))
    return RequestEvent(request_id=name, sequence=sequence, finished=finished)


@pytest.mark.parametrize("turns", range(40))
async def test_cancelled_at_any_await_nothing_is_left(turns: int) -> None:
    """However far a call has come, its follower is gone from the line when its task is."""
    async with set_up() as table:
        wire = table.wire

        async def consume() -> None:
            async with aclosing(table.calls.generate(request("a red fox"))) as responses:
                async for _ in responses:
                    await asyncio.sleep(0)

        await wire.pass_us(GATHER_US)  # behind the line's first word
        calling = asyncio.ensure_future(consume())
        for turn in range(turns):
            if turn == 8:
                (name,) = wire.link.submits
                wire.link.accept(1, name)
            if turn == 14:
                wire.link.say(AttachResponse(term=1, events=[ending(name)]))
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        await wire.settle()
        assert wire.line.followers == 0 and wire.line.unanswered == 0
        if wire.link.submits:  # control hears of every follower that it may have made
            assert wire.link.leaves


async def test_waiting_ends_with_the_request_or_with_its_time() -> None:
    async with set_up() as table:
        status = RequestStatus()
        status.metadata.request_id = "r1"
        table.shelf.statuses["r1"] = status
        in_time = asyncio.ensure_future(table.calls.wait("r1", 5 * SECOND_US))
        short = asyncio.ensure_future(table.calls.wait("r1", SECOND_US))
        await table.wire.settle()
        assert [f.onlooker for m in table.wire.link.said for f in m.follows] == [True, True]
        names = [f.follower for m in table.wire.link.said for f in m.follows]
        told = [Followed(follower=name) for name in names]
        table.wire.link.say(AttachResponse(term=1, followed=told))
        await table.wire.pass_us(SECOND_US)
        assert not (await short).HasField("ended") and not in_time.done()
        status.ended.CopyFrom(ending("r1"))
        table.wire.link.say(AttachResponse(term=1, events=[ending("r1")]))
        await table.wire.settle()
        assert (await in_time).HasField("ended")
        assert table.wire.line.followers == 0


async def test_media_of_what_has_not_finished() -> None:
    async with set_up() as table:
        status = RequestStatus()
        status.metadata.request_id = "r1"
        status.metadata.state = 2  # type: ignore[assignment]  # RUNNING
        table.shelf.statuses["r1"] = status
        with pytest.raises(NotFinished, match="running"):
            await anext(table.calls.media_of("r1", 0))
        status.ended.CopyFrom(ending("r1"))
        assert [c.data async for c in table.calls.media_of("r1", 0)] == [b"one", b"two"]


async def test_a_created_request_has_no_follower_and_lives_by_itself() -> None:
    async with set_up() as table:
        creating = asyncio.ensure_future(table.calls.create(request("a red fox")))
        await table.wire.settle()
        (submit,) = (s for m in table.wire.link.said for s in m.submits)
        assert submit.follower == "" and submit.submit.request.detached
        table.wire.link.accept(submit.call, submit.submit.request_id)
        status = await creating
        assert status.metadata.request_id == submit.submit.request_id
        assert status.metadata.accepted == Accepted(request_id=submit.submit.request_id)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda r: setattr(r.slo, "deadline_us", 7), True),
        (lambda r: setattr(r, "progress_every", 3), True),
        (lambda r: setattr(r, "detached", True), True),
        (lambda r: setattr(r, "idempotency_key", "other"), True),
        (lambda r: setattr(r.spec, "seed", 2), False),
        (lambda r: setattr(r.spec, "prompt", "another"), False),
        (lambda r: r.spec.loras.append("style"), False),
        (lambda r: setattr(r, "priority", 2), False),
    ],
)
def test_the_digest_of_a_wish(change: object, same: bool) -> None:
    assert callable(change)
    first, again = request("a fox", deadline_s=1), GenerateRequest()
    again.CopyFrom(first)
    change(again)
    assert (wish.digest(first) == wish.digest(again)) == same
