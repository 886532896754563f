"""The one table between typed errors and gRPC statuses, there and back over a real call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc
import pytest

from hocket.errors import (
    BrokerUnavailable,
    CallFailed,
    ControlUnavailable,
    GatewayUnreachable,
    HocketError,
    InvalidRequest,
    NotFinished,
    NotLeader,
    NotReady,
    NoWorkers,
    PeerSilent,
    Refused,
    RequestFailed,
    UnknownRequest,
    UnknownWorker,
    Violation,
    WrongConfig,
    from_rpc_error,
    status_code,
    to_status,
)

METHOD = "/test.Errors/Raise"


async def over_the_wire(error: HocketError) -> HocketError:
    async def fail(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort_with_status(to_status(error))
        return b""

    server = grpc.aio.server()
    handlers = {"Raise": grpc.unary_unary_rpc_method_handler(fail)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Errors", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Callable[[bytes], Awaitable[bytes]] = channel.unary_unary(METHOD)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"")
            return from_rpc_error(caught.value)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest((Violation("spec.steps", "found 99"), Violation("priority", "found 1000"))),
        Refused("QUEUE_FULL", "try later", 1_500_000, {"open": "64"}),
        Refused("DEADLINE_UNATTAINABLE", "too late"),
        RequestFailed("WORKER_LOST", "w0 died twice"),
        RequestFailed("CANCELLED", "cancelled after 3 steps"),
        UnknownRequest("01abc"),
        UnknownWorker("w9", ("w0", "w1")),
        NotReady(),
        NoWorkers(retry_after_us=2_000_000),
        ControlUnavailable(),
        GatewayUnreachable("gone"),
        NotLeader("127.0.0.1:7"),
        NotFinished("01abc", "RUNNING"),
        RequestFailed("MODEL_ERROR", "it broke", {"worker": "w1"}),
    ],
)
async def test_an_error_arrives_as_it_was_raised(error: HocketError) -> None:
    assert await over_the_wire(error) == error


@pytest.mark.parametrize("error", [BrokerUnavailable("nats://secret", "x"), PeerSilent("s", 1)])
async def test_inner_failures_arrive_as_not_ready(error: HocketError) -> None:
    assert isinstance(await over_the_wire(error), NotReady)


async def test_a_server_that_is_not_there_is_not_ready() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(b"")
    assert isinstance(from_rpc_error(caught.value), NotReady)


async def test_a_foreign_status_keeps_its_code() -> None:
    found = await over_the_wire(CallFailed("UNIMPLEMENTED", "no such call"))
    assert isinstance(found, CallFailed) and found.code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest(()), grpc.StatusCode.INVALID_ARGUMENT),
        (Refused("QUEUE_FULL", ""), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Refused("DEADLINE_UNATTAINABLE", ""), grpc.StatusCode.FAILED_PRECONDITION),
        (Refused("NO_WORKERS", ""), grpc.StatusCode.UNAVAILABLE),
        (RequestFailed("WORKER_LOST", ""), grpc.StatusCode.ABORTED),
        (RequestFailed("CANCELLED", ""), grpc.StatusCode.CANCELLED),
        (UnknownWorker("w9"), grpc.StatusCode.NOT_FOUND),
        (WrongConfig("k", "v", "a"), grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(error: HocketError, code: grpc.StatusCode) -> None:
    assert status_code(error) is code


def test_a_reason_is_the_class_in_upper_snake_case() -> None:
    assert BrokerUnavailable("u", "c").reason == "BROKER_UNAVAILABLE"
