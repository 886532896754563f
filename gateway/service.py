"""The gateway process: what it is made of, and how it starts and stops.

It stops in the order health -> drain -> stop: load balancers hear NOT_SERVING first, running calls
get `grace_s` to end, and only then the connections go.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
from google.longrunning.operations_pb2_grpc import add_OperationsServicer_to_server
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.access import Access
from gateway.calls import Calls
from gateway.cluster import ClusterWatch
from gateway.error_statuses import ErrorStatuses
from gateway.grpc_link import Doors
from gateway.inputs.store import InputStore
from gateway.inputs.uploads import Uploads
from gateway.limits import CallLimit
from gateway.line import Line
from gateway.media import MediaStore
from gateway.operations import GenerationOperations
from gateway.scaler import KedaScaler
from gateway.servicer import GenerationServicer
from gateway.settings import GatewaySettings
from gateway.whereabouts import Addresses, listed
from gateway.workflows.names import WorkflowNames
from gateway.workflows.servicer import WorkflowServicer
from hocket import garbage
from hocket.clock import SystemClock
from hocket.keda import externalscaler_pb2
from hocket.keda.externalscaler_pb2_grpc import add_ExternalScalerServicer_to_server
from hocket.launching import endpoints
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.leader import LeaderWatch
from hocket.rpc.channels import server_options
from hocket.rpc.interceptors import WrappedServer
from hocket.security.identity import Identity, add_port, broker_access, tell_if_open
from hocket.tracing.telemetry import Telemetry
from hocket.v1 import generation_pb2, workflows_pb2
from hocket.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from hocket.v1.workflows_pb2_grpc import add_WorkflowServiceServicer_to_server

log = logging.getLogger(__name__)

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
WORKFLOWS = workflows_pb2.DESCRIPTOR.services_by_name["WorkflowService"].full_name
OPERATIONS = "google.longrunning.Operations"
SCALER = externalscaler_pb2.DESCRIPTOR.services_by_name["ExternalScaler"].full_name
_HEALTH_NAMES = ("", SERVICE, WORKFLOWS, OPERATIONS)
_LAST_WORDS_S = 1.0  # for the followers' leaving to reach control


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
        identity = Identity.load(settings.tls_dir)
        access = broker_access(identity, "gateway")
        bus = await Bus.connect(settings.nats_url, f"gateway-{os.getpid()}", access=access)
        stack.push_async_callback(bus.close)
        checks = health.aio.HealthServicer()
        await _set_health(checks, False)

        async def on_change(ready: bool) -> None:
            await _set_health(checks, ready)

        doors = Doors(telemetry.client_interceptors(), identity)
        stack.push_async_callback(doors.close)
        cluster = ClusterWatch(doors, on_change, lambda: not bus.connected)
        leader = LeaderWatch(bus, settings.cluster)
        stack.push_async_callback(leader.close)
        line = _line(settings, doors, cluster, leader)
        names = WorkflowNames(cluster.ask, SystemClock())
        inputs = InputStore(
            bus,
            Subjects(settings.cluster),
            SystemClock(),
            settings.inputs_tenant_bytes_max,
        )
        uploads = Uploads(inputs, settings.upload_s)
        stack.callback(uploads.close)
        calls = _calls(settings, telemetry, bus, cluster, line, names, inputs)
        server, address = _server(
            settings, telemetry, calls, cluster, checks, identity, names, uploads
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        standing = [
            tasks.create_task(bus.failed()),
            tasks.create_task(cluster.watch()),
            tasks.create_task(line.run()),
            tasks.create_task(_watch_leader(leader)),
            tasks.create_task(garbage.keep(SystemClock(), lambda: not line.followers)),
        ]
        await server.start()
        try:
            yield address
        finally:
            await checks.enter_graceful_shutdown()
            await server.stop(settings.grace_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await line.emptied()
            for task in standing:
                task.cancel()


def _line(
    settings: GatewaySettings, doors: Doors, cluster: ClusterWatch, leader: LeaderWatch
) -> Line:
    def announced() -> list[str]:
        return [one.address for one in endpoints.living(settings.state_dir, "control")]

    where = Addresses(lambda: listed(settings.control), lambda: listed(leader.address), announced)
    name = f"gateway-{os.getpid()}-{secrets.token_hex(4)}"
    return Line(name, where, doors.dial, SystemClock(), cluster.leader_is)


async def _watch_leader(leader: LeaderWatch) -> None:
    async for address in leader:
        log.info("the leader is %s", address or "not known")


def _calls(
    settings: GatewaySettings,
    telemetry: Telemetry,
    bus: Bus,
    cluster: ClusterWatch,
    line: Line,
    names: WorkflowNames,
    inputs: InputStore,
) -> Calls:
    clock = SystemClock()
    bucket = Subjects(settings.cluster).media_bucket
    wait_us = round(settings.media_timeout_s * 1e6)
    return Calls(
        line=line,
        control=cluster,
        media=MediaStore(bus, bucket, clock, wait_us=wait_us),
        clock=clock,
        tracer=telemetry.tracer,
        submit_wait_us=round(settings.submit_timeout_s * 1e6),
        broker_away=lambda: not bus.connected,
        workflows=names,
        inputs=inputs,
    )


def _server(
    settings: GatewaySettings,
    telemetry: Telemetry,
    calls: Calls,
    cluster: ClusterWatch,
    checks: health.aio.HealthServicer,
    identity: Identity | None,
    names: WorkflowNames,
    uploads: Uploads,
) -> tuple[grpc.aio.Server, str]:
    # No bound on RPCs here: it would count cancels and health checks too.
    server = grpc.aio.server(options=server_options(settings.keepalive_s))
    wrappings = [*telemetry.server_wrappings(settings.caller_stall_s), ErrorStatuses()]
    at: Any = WrappedServer(server, wrappings)
    limit, callers = CallLimit(settings.calls_max), Access(settings.api_keys, SystemClock())
    generation = GenerationServicer(calls, limit, callers, uploads)
    add_GenerationServiceServicer_to_server(generation, at)
    add_WorkflowServiceServicer_to_server(WorkflowServicer(names, callers), at)
    add_OperationsServicer_to_server(GenerationOperations(calls, limit, callers), at)
    add_ExternalScalerServicer_to_server(KedaScaler(cluster, callers), at)
    health_pb2_grpc.add_HealthServicer_to_server(checks, at)
    told = (SERVICE, WORKFLOWS, OPERATIONS, SCALER, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(told, at)
    port = add_port(server, settings.listen, identity, mutual=settings.client_certs)
    tell_if_open(settings.listen, identity, "the gateway")
    return server, f"{settings.listen.rpartition(':')[0]}:{port}"


async def _set_health(checks: health.aio.HealthServicer, ready: bool) -> None:
    kinds = health_pb2.HealthCheckResponse
    for name in _HEALTH_NAMES:
        await checks.set(name, kinds.SERVING if ready else kinds.NOT_SERVING)
