"""The gateway's peer in these tests: a real gRPC server that speaks for control as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import grpc
from nats.js.errors import NotFoundError

from hocket.bus import Bus, Subjects
from hocket.channels import SERVER_OPTIONS
from hocket.v1.control_pb2 import (
    CancelRequestRequest,
    CancelRequestResponse,
    SubmitRequest,
    SubmitResponse,
    WatchClusterRequest,
    WatchClusterResponse,
    WorkerStatus,
)
from hocket.v1.control_pb2_grpc import (
    ControlServiceServicer,
    add_ControlServiceServicer_to_server,
)
from hocket.v1.generation_pb2 import Accepted, Finished, ModelInfo, Progress
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import MediaInfo, Shape

EMOJI = ModelInfo(
    name="emoji",
    family="emoji",
    workflows=["txt2img"],
    shapes=[Shape(width=s, height=s) for s in (128, 64, 256)],
    steps_min=1,
    steps_max=50,
    steps_default=20,
    guidance_kind="embedded",
    guidance_min=1.0,
    guidance_max=10.0,
    guidance_default=4.0,
    degrees=[1, 2, 4],
    examples=["a red fox"],
)
Script = Callable[["Peer", SubmitRequest], Awaitable[SubmitResponse]]


@dataclass
class Peer(ControlServiceServicer):
    """Answers Submit by `script`; remembers what it was asked."""

    bus: Bus
    subjects: Subjects
    script: Script
    address: str = ""
    server: grpc.aio.Server | None = None
    submits: list[SubmitRequest] = field(default_factory=list)
    traceparents: list[str] = field(default_factory=list)
    cancels: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    clusters: asyncio.Queue[WatchClusterResponse] = field(default_factory=asyncio.Queue)

    async def Submit(self, request: SubmitRequest, context: Any) -> SubmitResponse:
        self.submits.append(request)
        metadata = dict(context.invocation_metadata())
        self.traceparents.append(str(metadata.get("traceparent", "")))
        return await self.script(self, request)

    async def CancelRequest(
        self, request: CancelRequestRequest, context: Any
    ) -> CancelRequestResponse:
        self.cancels.put_nowait(request.request_id)
        return CancelRequestResponse(was_running=True)

    async def WatchCluster(
        self, request: WatchClusterRequest, context: Any
    ) -> AsyncIterator[WatchClusterResponse]:
        while True:
            yield await self.clusters.get()

    async def stop(self) -> None:
        """Dies at once: running calls break off."""
        assert self.server is not None
        await self.server.stop(None)

    def workers(self, *names: str) -> None:
        """Lets the gateway see these workers, serving the one model."""
        self.clusters.put_nowait(
            WatchClusterResponse(
                workers=[WorkerStatus(name=name, state="alive") for name in names],
                models=[EMOJI] if names else [],
            )
        )

    async def tell(self, request_id: str, *events: RequestEvent) -> None:
        """Publishes events of a request as control does."""
        for number, event in enumerate(events, 1):
            event.request_id, event.sequence = request_id, number
            await self.bus.publish(self.subjects.event(request_id), event)

    async def store(self, name: str, content: bytes) -> MediaInfo:
        """Writes a result as a worker does."""
        jetstream = self.bus.jetstream
        try:
            bucket = await jetstream.object_store(self.subjects.media_bucket)
        except NotFoundError:
            bucket = await jetstream.create_object_store(self.subjects.media_bucket)
        await bucket.put(name, content)
        return MediaInfo(
            media_type="image/png",
            size_bytes=len(content),
            sha256=sha256(content).hexdigest(),
            object_name=name,
            width=128,
            height=128,
            frames=1,
        )


@asynccontextmanager
async def running_peer(bus: Bus, subjects: Subjects, script: Script) -> AsyncIterator[Peer]:
    """A peer on a port of its own."""
    peer = Peer(bus, subjects, script)
    server = peer.server = grpc.aio.server(options=SERVER_OPTIONS)
    add_ControlServiceServicer_to_server(peer, server)
    peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield peer
    finally:
        await server.stop(None)


def accepted(request: SubmitRequest) -> SubmitResponse:
    answer = Accepted(
        request_id=request.request_id, predicted_latency_us=900_000, predicted_on_time=True
    )
    return SubmitResponse(request_id=request.request_id, accepted=answer)


def step(number: int, steps: int = 4, node: str = "dit") -> RequestEvent:
    progress = Progress(
        node=node,
        step=number,
        steps=steps,
        degree=2,
        workers=["w0", "w1"],
        step_time_us=11_000,
        predicted_step_time_us=10_000,
        eta_us=50_000,
    )
    return RequestEvent(progress=progress)


def done(media: MediaInfo, latency_us: int = 800_000) -> RequestEvent:
    return RequestEvent(
        finished=Finished(
            latency_us=latency_us,
            predicted_latency_us=900_000,
            on_time=True,
            degree_changes=1,
            media=media,
        )
    )
