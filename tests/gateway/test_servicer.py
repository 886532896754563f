"""The public door over real sockets: a real broker, and a peer that plays control."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway import wish
from hocket.client import Event, HocketClient, request
from hocket.errors import CallFailed, HocketError, InvalidRequest, NotReady, Refused, RequestFailed
from hocket.tracing.span_file import read_spans
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import Accepted, Finished, MediaChunk, Progress
from hocket.v1.mesh_pb2 import Cancelled, RequestEvent
from hocket.v1.types_pb2 import Failure
from tests.gateway.conftest import SERVING, Staging
from tests.gateway.peer import Peer, accepted, done, step

PICTURE = bytes(range(256)) * 2400  # 600 KiB: five pieces in the store


async def finish(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
    """Everything goes well, at once: the events are out before the answer is."""
    media = await peer.store(submit.request_id, PICTURE)
    await peer.tell(submit.request_id, *(step(k) for k in range(1, 5)), done(media))
    return accepted(submit)


async def accept_only(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
    return accepted(submit)


async def test_accepted_progress_media_finished_in_that_order(staged: Staging) -> None:
    async with staged(finish) as stage:
        events = [event async for event in stage.client.generate("a red fox")]
    kinds = [type(event) for event in events]
    assert kinds == [Accepted] + [Progress] * 4 + [MediaChunk] * 5 + [Finished]
    media = [event for event in events if isinstance(event, MediaChunk)]
    assert b"".join(chunk.data for chunk in media) == PICTURE
    assert [chunk.offset for chunk in media] == [n * (128 << 10) for n in range(5)]
    assert media[0].info.media_type == "image/png" and not media[1].HasField("info")
    first = events[0]
    assert isinstance(first, Accepted)
    assert first.effective_spec.steps == 20 and first.effective_spec.HasField("seed")
    assert len(first.request_id) == 26 and len(first.trace_id) == 32


async def test_progress_every_keeps_the_last_step(staged: Staging) -> None:
    wanted = request("a red fox")
    wanted.progress_every = 3
    async with staged(finish) as stage:
        events = [event async for event in stage.client.generate(wanted)]
    assert [e.step for e in events if isinstance(e, Progress)] == [3, 4]


async def test_what_control_gets_is_complete(staged: Staging) -> None:
    async with staged(finish) as stage:
        await stage.client.generate_media("a red fox", deadline_s=5)
        submit = stage.peer.submits[0]
    assert submit.request.spec.model == "emoji"
    assert submit.request.spec.shape.width == 128
    assert submit.request.slo.deadline_us == 5_000_000
    assert submit.request.idempotency_key.startswith("client-")
    assert submit.wish_sha256 == wish.digest(request("a red fox"))


async def test_one_trace_from_the_client_to_control(staged: Staging) -> None:
    async with staged(finish) as stage:
        events = [event async for event in stage.client.generate("a red fox")]
        trace_id = events[0].trace_id  # type: ignore[union-attr]
        assert stage.peer.traceparents[0].split("-")[1] == trace_id
        folder = stage.state_dir / "traces"
    found = {s.name: s for s in read_spans(folder) if s.trace_id == trace_id}
    assert {"Generate", "media fetch"} <= found.keys()
    root = found["Generate"]
    assert [event.name for event in root.events] == ["submitted", "answered"]
    assert root.attributes["hocket.outcome"] == "finished"
    assert root.attributes["hocket.shape"] == "128x128"
    assert root.parent_id, "the client's own span is its parent"


async def test_refusal_is_typed(staged: Staging) -> None:
    async def refuse(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        failure = Failure(
            reason="DEADLINE_UNATTAINABLE",
            message="predicted finish 3.1 s, due in 1 s",
            retry_after_us=2_000_000,
            metadata={"predicted_us": "3100000"},
        )
        return SubmitResponse(request_id=submit.request_id, rejected=failure)

    async with staged(refuse) as stage:
        with pytest.raises(Refused) as caught:
            await stage.client.generate_media("a red fox", deadline_s=1)
        assert stage.peer.cancels.empty()
    assert caught.value.reason == "DEADLINE_UNATTAINABLE"
    assert caught.value.retry_after_us == 2_000_000
    assert caught.value.metadata == {"predicted_us": "3100000"}


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (RequestEvent(failed=Failure(reason="WORKER_LOST", message="w0 died")), "WORKER_LOST"),
        (RequestEvent(cancelled=Cancelled(steps_done=2)), "CANCELLED"),
    ],
)
async def test_an_accepted_request_can_end_badly(
    staged: Staging, ending: RequestEvent, reason: str
) -> None:
    async def fail(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        await peer.tell(submit.request_id, step(1), ending)
        return accepted(submit)

    seen: list[Event] = []
    async with staged(fail) as stage:
        with pytest.raises(RequestFailed) as caught:
            async for event in stage.client.generate("a red fox"):
                seen.append(event)
        assert stage.peer.cancels.empty()
    assert caught.value.reason == reason
    assert [type(event) for event in seen] == [Accepted, Progress]


async def test_a_result_that_is_not_what_was_made_is_an_error(staged: Staging) -> None:
    async def corrupt(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        media = await peer.store(submit.request_id, PICTURE)
        media.sha256 = "0" * 64
        await peer.tell(submit.request_id, done(media))
        return accepted(submit)

    async with staged(corrupt) as stage:
        with pytest.raises(RequestFailed, match="not what the worker wrote"):
            await stage.client.generate_media("a red fox")


async def test_a_lost_result_is_an_error(staged: Staging) -> None:
    async def lose(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        media = await peer.store(submit.request_id, PICTURE)
        media.object_name = "elsewhere"
        await peer.tell(submit.request_id, done(media))
        return accepted(submit)

    async with staged(lose) as stage:
        with pytest.raises(RequestFailed) as caught:
            await stage.client.generate_media("a red fox")
    assert caught.value.reason == "MEDIA_LOST"


async def test_a_caller_that_goes_away_is_expected_back(staged: Staging) -> None:
    """A broken connection looks like a caller that gave up: control's grace tells them apart."""
    async with staged(accept_only) as stage:
        async with aclosing(stage.client.generate(request("a fox", idempotency_key="k"))) as events:
            await anext(events)
            (follower,) = stage.peer.followers
        leave = await stage.peer.leaves.get()
        assert leave.follower == follower and leave.returns
        assert stage.peer.cancels.empty()


async def test_the_rpc_deadline_ends_the_call_and_the_slo_does_not(staged: Staging) -> None:
    """5 ms of listening and 5 s until due are different things, and so is the other way round."""
    submitted = asyncio.Event()

    async def never(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        submitted.set()
        return accepted(submit)

    async with staged(never) as stage:
        with pytest.raises(CallFailed) as caught:
            await stage.client.generate_media("a red fox", deadline_s=5, timeout_s=0.005)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    async with staged(finish) as stage:  # due in a microsecond; the call lives on
        picture, _ = await stage.client.generate_media("a red fox", deadline_s=1e-6, timeout_s=30)
    assert picture == PICTURE


async def test_an_rpc_deadline_makes_the_follower_leave(staged: Staging) -> None:
    async with staged(accept_only) as stage:
        with pytest.raises(CallFailed) as caught:
            await stage.client.generate_media("a red fox", deadline_s=5, timeout_s=0.5)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert (await stage.peer.leaves.get()).returns


async def test_a_malformed_request_never_reaches_control(staged: Staging) -> None:
    bad = request("", shape=(100, 100), steps=999, guidance=float("nan"), priority=1000)
    async with staged(finish) as stage:
        with pytest.raises(InvalidRequest) as caught:
            await stage.client.generate_media(bad)
        assert stage.peer.submits == []
    assert {violation.field for violation in caught.value.violations} == {
        "spec.prompt",
        "spec.shape.width",
        "spec.shape.height",
        "spec.steps",
        "spec.guidance_scale",
        "priority",
    }


async def test_health_follows_the_workers(staged: Staging) -> None:
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

    async def nobody_works(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        failure = Failure(reason="NO_WORKERS", message="no worker has a living lease")
        return SubmitResponse(request_id=submit.request_id, rejected=failure)

    async with staged(nobody_works, workers=()) as stage:
        for name in ("", "hocket.v1.GenerationService"):
            await stage.health(name, not_serving)
        with pytest.raises(NotReady):
            await stage.client.generate_media("a red fox")
        stage.peer.workers("w0")
        for name in ("", "hocket.v1.GenerationService"):
            await stage.health(name, SERVING)
        assert [model.name for model in await stage.client.models()] == ["emoji"]
        stage.peer.workers()
        await stage.health("", not_serving)


async def test_reflection_lists_the_services(staged: Staging) -> None:
    async with staged(finish) as stage, grpc.aio.insecure_channel(stage.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([asked])):
            names = {service.name for service in answer.list_services_response.service}
            break
    assert {
        "hocket.v1.GenerationService",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
    } <= names


async def test_cancel_is_passed_on(staged: Staging) -> None:
    async with staged(finish) as stage:
        assert await stage.client.cancel("some-request")
        assert await stage.peer.cancels.get() == "some-request"


async def test_shutdown_flips_health_first_and_cancels_nothing(staged: Staging) -> None:
    """A request whose gateway goes away is picked up again through another one."""
    async with staged(accept_only, grace_s=0.2) as stage:
        client = HocketClient(stage.address, patience_s=0.0)
        events = client.generate("a red fox")
        assert isinstance(await anext(events), Accepted)
        async with grpc.aio.insecure_channel(stage.address) as channel:
            asked = health_pb2.HealthCheckRequest()
            watch = health_pb2_grpc.HealthStub(channel).Watch(asked)
            assert (await watch.read()).status == SERVING
            stopped = asyncio.ensure_future(stage.stop_gateway())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not stopped.done(), "health flips before calls are ended"
            with pytest.raises(HocketError):
                await anext(events)
            await stopped
        await client.close()
        leave = await stage.peer.leaves.get()
        assert leave.returns and stage.peer.cancels.empty()


async def test_a_backlog_costs_progress_and_nothing_else(staged: Staging) -> None:
    steps = 500

    async def burst(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        media = await peer.store(submit.request_id, PICTURE)
        told = (step(k, steps) for k in range(1, steps + 1))
        await peer.tell(submit.request_id, *told, done(media))
        return accepted(submit)

    async with staged(burst) as stage:
        events = [event async for event in stage.client.generate("a red fox")]
    progress = [event.step for event in events if isinstance(event, Progress)]
    assert progress == sorted(progress) and progress[-1] == steps
    assert len(progress) < steps
    assert isinstance(events[-1], Finished)
