"""The client where connections break: what it had is not made, told or fetched twice."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from hocket.client import Event, HocketClient, Options, request
from hocket.errors import CallFailed, GatewayUnreachable, NotFinished, RequestFailed, UnknownRequest
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import Accepted, Finished, MediaChunk, Progress
from hocket.v1.mesh_pb2 import Cancelled, RequestEvent
from hocket.v1.types_pb2 import Commitment, OnMiss
from tests.gateway.conftest import Staging
from tests.gateway.peer import Peer, accepted, done, step
from tests.gateway.proxy import proxied
from tests.gateway.test_servicer import PICTURE, accept_only, finish

LARGE = bytes(range(256)) * (16 << 10)  # 4 MiB


async def test_a_gateway_that_dies_is_survived(staged: Staging) -> None:
    """The stream breaks after a step; the rest comes through the other address."""
    async with staged(accept_only) as stage, proxied(stage.address) as first:
        async with HocketClient(f"{first.address},{stage.address}") as client:
            events: list[Event] = []
            async with aclosing(client.generate("a red fox")) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Accepted):
                        await stage.peer.tell(event.request_id, step(1))
                    elif isinstance(event, Progress) and event.step == 1:
                        first.cut()
                        name = stage.peer.submits[0].request_id
                        media = await stage.peer.store(name, PICTURE)
                        await stage.peer.tell(name, step(2), done(media))
        kinds = [type(event) for event in events]
        assert kinds == [Accepted, Progress, Progress, *[MediaChunk] * 5, Finished]
        assert b"".join(e.data for e in events if isinstance(e, MediaChunk)) == PICTURE
        assert len(stage.peer.submits) == 1 and stage.peer.cancels.empty()


async def test_media_are_gone_on_with_where_they_broke(staged: Staging) -> None:
    async def large(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        await peer.tell(submit.request_id, done(await peer.store("large", LARGE)))
        return accepted(submit)

    async with staged(large) as stage, proxied(stage.address) as first:
        first.cut_after_bytes = 2 << 20
        async with HocketClient(f"{first.address},{stage.address}") as client:
            picture, finished = await client.generate_media("a red fox")
            assert picture == LARGE and finished.media.size_bytes == len(LARGE)
            assert first.passed_bytes >= 2 << 20 and len(stage.peer.submits) == 1
        name = stage.peer.submits[0].request_id
        first.down, first.passed_bytes = False, 0
        async with HocketClient(f"{first.address},{stage.address}") as client:
            assert await client.result(name) == LARGE
            chunks = [chunk async for chunk in client.media(name, 1_000_000)]
            assert chunks[0].HasField("info") and chunks[0].offset == 1_000_000


async def test_a_break_before_the_answer_repeats_the_same_wish(staged: Staging) -> None:
    """Control may have it already: the drawn key finds it."""

    async def cut_first(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        if len(peer.submits) == 1:
            first.cut()
        return await finish(peer, peer.submits[0])

    async with staged(cut_first) as stage, proxied(stage.address) as first:
        async with HocketClient(f"{first.address},{stage.address}") as client:
            picture, _ = await client.generate_media("a red fox")
        one, again = stage.peer.submits
        assert picture == PICTURE
        assert one.request.idempotency_key == again.request.idempotency_key != ""
        assert one.wish_sha256 == again.wish_sha256


async def test_the_only_gateway_is_waited_for_and_not_for_ever(staged: Staging) -> None:
    async with staged(accept_only) as stage, proxied(stage.address) as only:
        patient = HocketClient(only.address, patience_s=30.0)
        async with patient, aclosing(patient.generate("a red fox")) as stream:
            first = await anext(stream)
            assert isinstance(first, Accepted)
            only.cut()
            only.down = False
            media = await stage.peer.store("m", PICTURE)
            await stage.peer.tell(first.request_id, done(media))
            rest = [event async for event in stream]
            assert isinstance(rest[-1], Finished)
        hasty = HocketClient(only.address, patience_s=0.2)
        async with hasty, aclosing(hasty.generate("a red fox")) as stream:
            await anext(stream)
            only.cut()
            with pytest.raises(GatewayUnreachable):
                await anext(stream)


async def test_a_gateway_that_never_was_there_is_told_at_once() -> None:
    async with HocketClient("127.0.0.1:1,127.0.0.1:2", patience_s=3600.0) as client:
        with pytest.raises(GatewayUnreachable):
            await client.generate_media("a red fox")


@pytest.mark.parametrize(
    ("options", "cancels"),
    [({}, True), ({"idempotency_key": "mine"}, False), ({"detached": True}, False)],
)
async def test_closing_early_cancels_what_nobody_else_can_follow(
    staged: Staging, options: Options, cancels: bool
) -> None:
    async with staged(accept_only) as stage:
        async with aclosing(stage.client.generate("a red fox", **options)) as events:
            first = await anext(events)
        assert isinstance(first, Accepted)
        assert stage.peer.cancels.qsize() == int(cancels)
        if cancels:
            assert stage.peer.cancels.get_nowait() == first.request_id


async def test_a_timeout_cancels(staged: Staging) -> None:
    async with staged(accept_only) as stage:
        with pytest.raises(CallFailed) as caught:
            await stage.client.generate_media("a red fox", timeout_s=0.5)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert await stage.peer.cancels.get() == stage.peer.submits[0].request_id


async def test_an_operation_of_its_own_life(staged: Staging) -> None:
    async with staged(accept_only) as stage:
        client = stage.client
        made = await client.create("a red fox", steps=7)
        assert made.metadata.accepted.request_id == made.request_id and not made.done
        assert not (await client.wait(made.request_id, timeout_s=0.01)).done
        with pytest.raises(NotFinished):
            await client.result(made.request_id)
        waiting = asyncio.ensure_future(client.wait(made.request_id))
        await stage.peer.tell(made.request_id, step(1))
        media = await stage.peer.store(made.request_id, PICTURE)
        await stage.peer.tell(made.request_id, done(media))
        ended = await waiting
        assert ended.finished is not None and ended.finished.media == media
        assert await client.result(made.request_id) == PICTURE
        told = [(type(event), cursor) async for event, cursor in client.watch(made.request_id)]
        assert [kind for kind, _ in told] == [Accepted, Progress, Finished]
        rest = [type(e) async for e, _ in client.watch(made.request_id, told[1][1])]
        assert rest == [Finished]
        assert [g.request_id async for g in client.list()] == [made.request_id]
        await client.delete(made.request_id)
        assert stage.peer.deleted == [made.request_id]
        with pytest.raises(UnknownRequest):
            await client.get("nobody")


async def test_a_cancelled_operation_has_its_error(staged: Staging) -> None:
    async with staged(accept_only) as stage:
        made = await stage.client.create("a red fox")
        await stage.peer.tell(made.request_id, RequestEvent(cancelled=Cancelled(steps_done=3)))
        ended = await stage.client.get(made.request_id)
        assert isinstance(ended.error, RequestFailed) and ended.error.reason == "CANCELLED"


def test_options_in_their_places() -> None:
    wanted = request(
        "a fox",
        negative_prompt="rain",
        shape=(64, 32),
        guidance=2.0,
        deadline_s=1.5,
        on_miss=OnMiss.ON_MISS_DEGRADE,
        commitment=Commitment.COMMITMENT_FIRM,
        steps_min=4,
        shape_min=(32, 16),
        priority=3,
        tenant="acme",
        idempotency_key="k",
        detached=True,
        progress_every=5,
    )
    assert (wanted.spec.shape.width, wanted.spec.shape.height) == (64, 32)
    assert wanted.spec.negative_prompt == "rain" and wanted.spec.guidance_scale == 2.0
    slo = wanted.slo
    assert (slo.deadline_us, slo.on_miss, slo.commitment) == (1_500_000, 3, 1)
    assert (slo.degrade.steps_min, slo.degrade.width_min, slo.degrade.height_min) == (4, 32, 16)
    assert (wanted.priority, wanted.tenant, wanted.idempotency_key) == (3, "acme", "k")
    assert wanted.detached and wanted.progress_every == 5
    assert not request("a fox").slo.HasField("degrade")
