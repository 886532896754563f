"""The gateway process: what it is made of, and how it starts and stops.

It stops in the order health -> drain -> stop: load balancers hear NOT_SERVING first, running calls
get `grace_s` to end, and only then the connections go.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.background import Background
from gateway.cluster import Cluster
from gateway.departures import Departures
from gateway.error_statuses import ErrorStatuses
from gateway.media import MediaStore
from gateway.mesh import Mesh
from gateway.servicer import GenerationServicer
from gateway.settings import GatewaySettings
from hocket import endpoints
from hocket.bus import Bus, Subjects
from hocket.channels import SERVER_OPTIONS
from hocket.errors import WrongConfig
from hocket.telemetry import Telemetry
from hocket.v1 import generation_pb2
from hocket.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server

log = logging.getLogger(__name__)

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
_HEALTH_NAMES = ("", SERVICE)
_CANCELS_S = 2.0


async def serve(settings: GatewaySettings, telemetry: Telemetry) -> None:
    """Runs one gateway until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running(settings, telemetry) as address:
        endpoints.announce(settings.state_dir, "gateway", address)
        log.info("gateway listens on %s (pid %d)", address, os.getpid())
        try:
            await stop.wait()
        finally:
            endpoints.withdraw(settings.state_dir, "gateway")


@asynccontextmanager
async def running(settings: GatewaySettings, telemetry: Telemetry) -> AsyncIterator[str]:
    """A gateway that serves while the block runs; gives the address it is bound to."""
    async with AsyncExitStack() as stack:
        bus = await Bus.connect(settings.nats_url, f"gateway-{os.getpid()}")
        stack.push_async_callback(bus.close)
        checks = health.aio.HealthServicer()
        await _set_health(checks, False)
        mesh = _mesh(settings, telemetry, bus, checks)
        stack.push_async_callback(mesh.cluster.close)
        server, address = _server(settings, telemetry, mesh, checks)
        stack.push_async_callback(mesh.background.close, _CANCELS_S)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        watch = tasks.create_task(mesh.cluster.watch())
        await server.start()
        try:
            yield address
        finally:
            mesh.departures.shutting_down = True
            await checks.enter_graceful_shutdown()
            await server.stop(settings.grace_s)
            watch.cancel()


def _mesh(
    settings: GatewaySettings, telemetry: Telemetry, bus: Bus, checks: health.aio.HealthServicer
) -> Mesh:
    subjects = Subjects(settings.cluster)

    async def on_change(ready: bool) -> None:
        await _set_health(checks, ready)

    def control_address() -> str:
        if settings.control:
            return settings.control
        found = endpoints.find(settings.state_dir, "control")
        return found.address if found is not None else ""

    cluster = Cluster(control_address, telemetry.client_interceptors(), on_change)
    media = MediaStore(
        bus,
        subjects.media_bucket,
        bytes_max=settings.media_bytes_max,
        fetches_max=settings.media_fetches_max,
        timeout_s=settings.media_timeout_s,
    )
    return Mesh(
        bus=bus,
        subjects=subjects,
        cluster=cluster,
        media=media,
        background=Background(),
        departures=Departures(cluster),
        tracer=telemetry.tracer,
        settings=settings,
    )


def _server(
    settings: GatewaySettings,
    telemetry: Telemetry,
    mesh: Mesh,
    checks: health.aio.HealthServicer,
) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(
        interceptors=[*telemetry.server_interceptors(), ErrorStatuses()],
        options=SERVER_OPTIONS,
        maximum_concurrent_rpcs=settings.calls_max,
    )
    add_GenerationServiceServicer_to_server(GenerationServicer(mesh), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError:
        raise WrongConfig("--listen", settings.listen, 'a free "host:port"') from None
    return server, f"{settings.listen.rpartition(':')[0]}:{port}"


async def _set_health(checks: health.aio.HealthServicer, ready: bool) -> None:
    kinds = health_pb2.HealthCheckResponse
    for name in _HEALTH_NAMES:
        await checks.set(name, kinds.SERVING if ready else kinds.NOT_SERVING)
