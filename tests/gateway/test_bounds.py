"""What bounds a gateway: calls, callers that stand still, bursts; and that calls leave nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2 as lro
from google.longrunning.operations_pb2_grpc import OperationsStub

from gateway.follower import Follower
from hocket.errors import Refused, from_rpc_error
from hocket.rpc.channels import SERVER_OPTIONS
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GetMediaRequest,
    GetMediaResponse,
)
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import GenerationSpec
from tests.gateway.conftest import SERVING, Staging
from tests.gateway.peer import Peer, accepted, done
from tests.gateway.test_servicer import PICTURE, accept_only, finish
from tests.waiting import until

WANTED = GenerateRequest(spec=GenerationSpec(prompt="a fox"))
BURST = 3_200  # more than grpc's core lets wait by default


async def test_a_full_gateway_still_cancels_and_tells_its_health(staged: Staging) -> None:
    async with staged(accept_only, calls_max=6) as stage, AsyncExitStack() as stack:
        for _ in range(6):
            events = await stack.enter_async_context(aclosing(stage.client.generate("a fox")))
            await anext(events)
        with pytest.raises(Refused) as caught:
            await stage.client.generate_media("a fox")
        assert caught.value.reason == "TOO_MANY_CALLS" and caught.value.retry_after_us > 0
        assert await stage.client.cancel("some-request")
        await stage.health("", SERVING)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(stage.address))
        operations = OperationsStub(channel)
        await operations.ListOperations(lro.ListOperationsRequest())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            asked = GetMediaRequest(request_id="r1")
            await GenerationServiceStub(channel).GetMedia(asked).read()
        assert from_rpc_error(refused.value).reason == "TOO_MANY_CALLS"
    async with staged(finish, calls_max=1) as stage:
        for _ in range(3):  # the place of a call that ended is free
            await stage.client.generate_media("a fox")


async def test_a_caller_that_takes_nothing_is_ended(
    staged: Staging, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def large(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        await peer.tell(submit.request_id, done(await peer.store("large", bytes(24 << 20))))
        return accepted(submit)

    async with staged(large, caller_stall_s=0.2, calls_max=1) as stage:
        async with grpc.aio.insecure_channel(stage.address) as channel:
            stream = GenerationServiceStub(channel).Generate(WANTED)
            assert (await stream.read()).HasField("accepted")
            await until(lambda: "took nothing" in caplog.text)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await stream.read():
                    pass
            assert from_rpc_error(caught.value).reason == "CALLER_TOO_SLOW"
        assert stage.peer.followers == {}
        picture, _ = await stage.client.generate_media("a fox")  # its place is free again
        assert len(picture) == 24 << 20


async def test_every_call_of_a_burst_reaches_a_handler() -> None:
    """Up to 413 of 2,500 callers used to get a bare CANCELLED from grpc's core."""

    async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "typed")
        raise AssertionError("abort raises")

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Ask": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.Burst", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/t.Burst/Ask")

        async def one() -> str:
            try:
                await ask(b"", wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name} {error.details()}"
            return "OK"

        calls = [asyncio.ensure_future(one()) for _ in range(BURST)]
        await server.start()
        assert Counter(await asyncio.gather(*calls)) == {"RESOURCE_EXHAUSTED typed": BURST}
    await server.stop(None)


async def test_a_closed_stream_leaves_no_traceback(
    staged: Staging, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenTelemetry's "was created in a different Context", at each caller that went away."""

    async def two_events(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        media = await peer.store(submit.request_id, bytes(4 << 20))
        await peer.tell(submit.request_id, done(media))
        return accepted(submit)

    async with staged(two_events) as stage, grpc.aio.insecure_channel(stage.address) as channel:
        generation = GenerationServiceStub(channel)
        for reads in (1, 2, 3):
            stream = generation.Generate(WANTED)
            for _ in range(reads):
                await stream.read()
            stream.cancel()
        await until(lambda: len(stage.peer.submits) == 3 and not stage.peer.followers)
        gc.collect()
        await stage.client.generate_media("a fox")
    assert "different Context" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_calls_leave_nothing_in_memory(staged: Staging) -> None:
    """After 200 calls, ended well, badly, or broken off, no object of a call is left."""
    kinds = (Follower, RequestEvent, GenerateResponse, GetMediaResponse, SubmitRequest)

    async def settle(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        peer.submits.clear()
        peer.told.clear()
        if submit.request.spec.prompt == "stay":
            return accepted(submit)
        return await finish(peer, submit)

    async with staged(settle) as stage:

        async def call(number: int) -> None:
            if number % 2:
                picture, _ = await stage.client.generate_media("a red fox")
                assert picture == PICTURE
                return
            async with aclosing(stage.client.generate("stay")) as events:
                await anext(events)

        async def tidy() -> Counter[str]:
            await until(lambda: not stage.peer.followers)
            stage.peer.told.clear()
            stage.peer.submits.clear()
            stage.peer.follows = asyncio.Queue()
            stage.peer.leaves = asyncio.Queue()
            for _ in range(10):  # the test's own client closes its generators in tasks
                gc.collect()
                await asyncio.sleep(0)
            found = Counter(
                type(o).__name__ for o in gc.get_objects() if issubclass(type(o), kinds)
            )
            found["tasks"] = len(asyncio.all_tasks())
            found["subscriptions"] = len(_client(stage.peer)._subs)
            return found

        await asyncio.gather(*(call(n) for n in range(20)))
        before = await tidy()
        for _ in range(10):
            await asyncio.gather(*(call(n) for n in range(20)))
        after = await tidy()
        for kind in after:
            assert after[kind] <= before[kind] + 3, (kind, before, after)


def _client(peer: Peer) -> Any:
    return peer.bus._client
