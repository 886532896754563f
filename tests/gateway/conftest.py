"""A gateway over real sockets, between the test's client and the test's control."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.service import running
from gateway.settings import GatewaySettings
from hocket.client import HocketClient
from hocket.messaging.bus import Bus, Subjects
from hocket.tracing import telemetry
from tests.gateway.peer import Peer, Script, running_peer

SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass
class Stage:
    """What a test plays with."""

    peer: Peer
    client: HocketClient
    address: str
    state_dir: Path
    stop_gateway: Callable[[], Awaitable[None]]

    async def health(self, service: str, wanted: int) -> None:
        """Returns once the gateway's health is as wanted."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service=service)
            )
            async for answer in watch:
                if answer.status == wanted:
                    return


Staging = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def staged(bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path) -> Staging:
    """Starts control's stand-in and a gateway; ready to serve unless `workers` is empty."""

    @asynccontextmanager
    async def start(
        script: Script, workers: tuple[str, ...] = ("w0",), **options: object
    ) -> AsyncIterator[Stage]:
        told = telemetry.setup("gateway", "t", tmp_path, "warning")
        try:
            async with running_peer(bus, subjects, script) as peer:
                peer.workers(*workers)
                settings = GatewaySettings(
                    **{
                        "cluster": subjects.cluster,
                        "nats_url": nats_url,
                        "state_dir": tmp_path,
                        "control": peer.address,
                        "grace_s": 0.5,
                        **options,
                    }  # type: ignore[arg-type]
                )
                async with AsyncExitStack() as clients, AsyncExitStack() as gateway:
                    address = await gateway.enter_async_context(running(settings, told))
                    client = await clients.enter_async_context(
                        HocketClient(address, tracer_provider=told.provider)
                    )
                    stage = Stage(peer, client, address, tmp_path, gateway.aclose)
                    if workers and settings.control:
                        await stage.health("", SERVING)
                    yield stage
        finally:
            told.close()

    return start
