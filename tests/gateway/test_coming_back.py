"""Callers, gateways and control go away and come back; what was accepted goes on meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing

import grpc
import pytest
from grpc_health.v1 import health_pb2

from hocket.client import request
from hocket.errors import (
    BrokerAway,
    ControlUnavailable,
    HocketError,
    InvalidRequest,
    NoWorkers,
    Refused,
    UnknownRequest,
    from_rpc_error,
)
from hocket.launching import endpoints
from hocket.messaging.bus import Bus, Subjects
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import (
    Accepted,
    Finished,
    GenerateRequest,
    Progress,
    WatchGenerationRequest,
)
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import Failure, GenerationSpec
from tests.gateway.conftest import SERVING, Stage, Staging
from tests.gateway.peer import Peer, accepted, done, running_peer, step
from tests.gateway.test_calls import stalled_calls
from tests.gateway.test_servicer import PICTURE, accept_only, finish

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
EARLIER = "0" * 26


async def nobody_works(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
    failure = Failure(reason="NO_WORKERS", message="no worker has a living lease")
    return SubmitResponse(request_id=submit.request_id, rejected=failure)


async def test_a_key_finds_its_request_while_no_worker_is_there(staged: Staging) -> None:
    """It used to be refused at the gateway, until control had given its followers up."""
    async with staged(finish) as stage:
        stage.peer.workers()
        await stage.health("", NOT_SERVING)
        media, _ = await stage.client.generate_media("a fox", idempotency_key="k")
        assert media == PICTURE
        assert [submit.known_only for submit in stage.peer.submits] == [True]


async def watched(stage: Stage, request_id: str, cursor: str = "") -> list[tuple[str, str]]:
    """Kind and cursor of all that WatchGeneration tells."""
    async with grpc.aio.insecure_channel(stage.address) as channel:
        asked = WatchGenerationRequest(request_id=request_id, cursor=cursor)
        stream = GenerationServiceStub(channel).WatchGeneration(asked)
        return [(str(r.WhichOneof("event")), r.cursor) async for r in stream]


async def test_a_repeated_key_is_told_what_the_first_call_was(staged: Staging) -> None:
    """Its seed, its trace and its spec: after the end too, where they used to be drawn anew."""
    first = Accepted(request_id=EARLIER, trace_id="ab" * 16, predicted_latency_us=5)
    first.effective_spec.CopyFrom(GenerationSpec(seed=42, steps=7, model="emoji"))

    async def ended(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        media = await peer.store(EARLIER, PICTURE)
        begun = RequestEvent(request_id=EARLIER, sequence=1, accepted=first)
        peer.told[EARLIER] = [begun]
        await peer.tell(EARLIER, done(media))
        return SubmitResponse(request_id=EARLIER, already_finished=done(media).finished)

    async def runs(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        media = await peer.store(EARLIER, PICTURE)
        await peer.tell(EARLIER, step(1), done(media))
        return SubmitResponse(request_id=EARLIER, accepted=first)

    for script in (ended, runs):
        async with staged(script) as stage:
            wanted = request("a red fox", tenant="acme", idempotency_key="order-7")
            events = [event async for event in stage.client.generate(wanted)]
        assert events[0] == first
        assert isinstance(events[-1], Finished)


async def test_a_follower_comes_back_to_the_next_leader(
    staged: Staging, bus: Bus, subjects: Subjects
) -> None:
    """Control dies, and the next one is at another address: the caller sees a pause."""
    async with staged(accept_only, control="") as stage, AsyncExitStack() as stack:
        endpoints.announce(stage.state_dir, "control", stage.peer.address)
        await stage.health("", SERVING)
        events = stage.client.generate("a red fox")
        first = await anext(events)
        assert isinstance(first, Accepted)
        await stage.peer.tell(first.request_id, step(1))
        assert isinstance(await anext(events), Progress)
        await stage.peer.stop()
        other = await stack.enter_async_context(running_peer(bus, subjects, finish, term=2))
        other.told[first.request_id] = stage.peer.told[first.request_id]
        other.workers("w0")
        endpoints.announce(stage.state_dir, "control", other.address)
        follow = await other.follows.get()
        assert follow.request_id == first.request_id
        assert follow.cursor == stage.peer.told[first.request_id][-1].sequence
        media = await other.store(first.request_id, PICTURE)
        await other.tell(first.request_id, step(2), done(media))
        rest = [event async for event in events]
        assert [e.step for e in rest if isinstance(e, Progress)] == [2]
        assert isinstance(rest[-1], Finished)
        await stage.health("", SERVING)
        endpoints.withdraw(stage.state_dir, "control")


async def test_a_restart_of_control_does_not_lose_a_submit(
    staged: Staging, bus: Bus, subjects: Subjects
) -> None:
    """Control dies with the submit in its hands; the same one reaches the next."""
    asked = asyncio.Event()

    async def hesitate(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError("cancelled by the stop")

    async with running_peer(bus, subjects, finish, term=2) as other:
        other.workers("w0")
        async with staged(hesitate, control="") as stage:
            endpoints.announce(stage.state_dir, "control", stage.peer.address)
            await stage.health("", SERVING)
            calling = asyncio.ensure_future(stage.client.generate_media("a red fox"))
            await asked.wait()
            endpoints.announce(stage.state_dir, "control", other.address)
            await stage.peer.stop()
            picture, _ = await calling
            assert picture == PICTURE and other.submits[0] == stage.peer.submits[0]
            endpoints.withdraw(stage.state_dir, "control")


async def test_the_leader_is_found_among_several(
    staged: Staging, bus: Bus, subjects: Subjects
) -> None:
    async with running_peer(bus, subjects, finish, term=2) as leader:
        leader.workers("w0")
        async with running_peer(bus, subjects, finish) as standby:
            standby.leader = leader.address
            addresses = f"127.0.0.1:1,{standby.address}"
            async with staged(finish, control=addresses) as stage:
                await stage.health("", SERVING)
                await stage.client.generate_media("a red fox")
                assert len(leader.submits) == 1 and standby.submits == []


async def test_without_control_a_new_request_is_refused_by_its_name(staged: Staging) -> None:
    async with staged(finish, submit_timeout_s=0.3) as stage:
        await stage.peer.stop()
        await stage.health("", NOT_SERVING)
        with pytest.raises(ControlUnavailable, match="no leader") as caught:
            await stage.client.generate_media("a red fox")
        assert caught.value.retry_after_us > 0
    async with staged(finish, control="") as stage:
        with pytest.raises(ControlUnavailable, match="not been found"):
            await stage.client.generate_media("a red fox")
    async with staged(nobody_works) as stage:
        stage.peer.workers()
        await stage.health("", NOT_SERVING)
        with pytest.raises(NoWorkers):
            await stage.client.generate_media("a red fox")


async def test_a_control_that_waits_for_the_broker_is_not_blamed() -> None:
    """Which of the two is away is told apart by whom this gateway reaches."""

    async with stalled_calls(broker_away=True) as calls:
        with pytest.raises(BrokerAway):
            await anext(calls.generate(request("a red fox")))
    async with stalled_calls(broker_away=False) as calls:
        with pytest.raises(ControlUnavailable, match="did not answer"):
            await anext(calls.generate(request("a red fox")))


async def test_watching_tells_all_and_goes_on_from_a_cursor(staged: Staging) -> None:
    async with staged(finish) as stage:
        events = [event async for event in stage.client.generate("a red fox")]
        assert isinstance(events[0], Accepted)
        name = events[0].request_id
        told = await watched(stage, name)
        kinds = [kind for kind, _ in told]
        assert kinds == ["accepted", *["progress"] * 4, "finished"]
        assert len({cursor for _, cursor in told}) == len(told)
        for place, (_, cursor) in enumerate(told[:-1]):
            assert await watched(stage, name, cursor) == told[place + 1 :]
        assert await watched(stage, name, told[-1][1]) == told[-1:], "the end is told again"


async def test_what_generate_tells_can_be_watched_on(staged: Staging) -> None:
    async with staged(finish) as stage, grpc.aio.insecure_channel(stage.address) as channel:
        wanted = GenerateRequest(spec=GenerationSpec(prompt="a fox"))
        stream = GenerationServiceStub(channel).Generate(wanted)
        responses = [response async for response in stream]
        told = [(r.WhichOneof("event"), r.cursor) for r in responses if r.cursor]
        name = responses[0].accepted.request_id
        assert told == await watched(stage, name)


@pytest.mark.parametrize(
    ("name", "cursor", "kind"),
    [("nobody", "", UnknownRequest), ("nobody", "7", UnknownRequest), ("x", "abc", InvalidRequest)],
)
async def test_a_wrong_watch_is_an_error(
    staged: Staging, name: str, cursor: str, kind: type[HocketError]
) -> None:
    async with staged(finish) as stage:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watched(stage, name, cursor)
    assert isinstance(from_rpc_error(caught.value), kind)


async def test_a_watcher_that_goes_is_expected_back(staged: Staging) -> None:
    async with staged(accept_only) as stage, grpc.aio.insecure_channel(stage.address) as channel:
        await stage.peer.tell("r1", step(1))
        asked = WatchGenerationRequest(request_id="r1")
        stream = GenerationServiceStub(channel).WatchGeneration(asked)
        assert (await stream.read()).HasField("progress")
        assert not (await stage.peer.follows.get()).onlooker
        stream.cancel()
        assert (await stage.peer.leaves.get()).returns


async def test_after_the_end_the_follower_is_gone_for_good(staged: Staging) -> None:
    async with staged(finish) as stage:
        await stage.client.generate_media("a red fox")
        assert not (await stage.peer.leaves.get()).returns
        assert stage.peer.followers == {}


async def test_an_overloaded_control_is_told_as_it_says(staged: Staging) -> None:
    async def full(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        answer = SubmitResponse(request_id=submit.request_id)
        answer.rejected.reason = "QUEUE_FULL"
        answer.rejected.retry_after_us = 3
        return answer

    async with staged(full) as stage, aclosing(stage.client.generate("a fox")) as events:
        with pytest.raises(Refused) as caught:
            await anext(events)
    assert (caught.value.reason, caught.value.retry_after_us) == ("QUEUE_FULL", 3)


async def test_several_calls_of_one_gateway_are_batched(staged: Staging) -> None:
    async with staged(lambda peer, submit: _accept(submit)) as stage:
        calls = [stage.client.generate("a red fox") for _ in range(50)]
        firsts = await asyncio.gather(*(anext(call) for call in calls))
        assert len({first.request_id for first in firsts if isinstance(first, Accepted)}) == 50
        assert len(stage.peer.gateways) == 1
        await asyncio.gather(*(call.aclose() for call in calls))
        for _ in range(50):
            await stage.peer.leaves.get()
        assert stage.peer.followers == {}


async def _accept(submit: SubmitRequest) -> SubmitResponse:
    return accepted(submit)
