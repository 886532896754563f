"""The gateway's peer in these tests: a real gRPC server that speaks for control as it is told.

It keeps what it was told and what it has told, so that followers come, go and come again as with
the real one; what a request becomes is a test's script to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import grpc
from nats.js.errors import NotFoundError

from hocket.errors import NotLeader, UnknownRequest, to_status
from hocket.messaging.bus import Bus, Subjects
from hocket.rpc.channels import SERVER_OPTIONS
from hocket.v1 import control_pb2 as pb
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.control_pb2_grpc import (
    ControlServiceServicer,
    add_ControlServiceServicer_to_server,
)
from hocket.v1.generation_pb2 import Accepted, Finished, GenerationState, ModelInfo, Progress
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import Failure, MediaInfo, Shape

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
Out = asyncio.Queue[pb.AttachResponse]
_BEAT_S = 0.5
_ENDINGS = ("finished", "failed", "cancelled")


@dataclass
class Peer(ControlServiceServicer):
    """Answers submits by `script`; remembers what it was asked."""

    bus: Bus
    subjects: Subjects
    script: Script
    term: int = 1
    address: str = ""
    server: grpc.aio.Server | None = None
    leader: str | None = None  # set: this replica does not lead
    gateways: list[str] = field(default_factory=list)
    submits: list[SubmitRequest] = field(default_factory=list)
    traceparents: list[str] = field(default_factory=list)
    follows: asyncio.Queue[pb.Follow] = field(default_factory=asyncio.Queue)
    leaves: asyncio.Queue[pb.Leave] = field(default_factory=asyncio.Queue)
    cancels: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    cluster: pb.WatchClusterResponse = field(default_factory=pb.WatchClusterResponse)
    told: dict[str, list[RequestEvent]] = field(default_factory=dict)  # by request
    followers: dict[str, tuple[str, Out]] = field(default_factory=dict)  # name -> request, line
    deleted: list[str] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def Attach(
        self, requests: AsyncIterator[pb.AttachRequest], context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        if self.leader is not None:
            await context.abort_with_status(to_status(NotLeader(self.leader)))
        out: Out = asyncio.Queue()
        hearing = asyncio.ensure_future(self._hear(requests, out))
        try:
            while not hearing.done():
                try:
                    async with asyncio.timeout(_BEAT_S):
                        message = await out.get()
                except TimeoutError:
                    message = pb.AttachResponse()
                message.term = self.term
                yield message
        finally:
            hearing.cancel()
            for name, (_, line) in tuple(self.followers.items()):
                if line is out:  # the end of a stream is a leave that may come back
                    del self.followers[name]
                    self.leaves.put_nowait(pb.Leave(follower=name, returns=True))

    async def _hear(self, requests: AsyncIterator[pb.AttachRequest], out: Out) -> None:
        async for message in requests:
            if message.gateway:
                self.gateways.append(message.gateway)
                out.put_nowait(pb.AttachResponse())
            for submit in message.submits:
                task = asyncio.ensure_future(self._admit(submit, out))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
            for follow in message.follows:
                self.follows.put_nowait(follow)
                self._follow(follow.follower, follow.request_id, follow.cursor, out)
            for leave in message.leaves:
                if self.followers.pop(leave.follower, None) is not None:
                    self.leaves.put_nowait(leave)

    async def _admit(self, attached: pb.AttachedSubmit, out: Out) -> None:
        self.submits.append(attached.submit)
        self.traceparents.append(attached.traceparent)
        answer = await self.script(self, attached.submit)
        if answer.HasField("accepted"):
            first = RequestEvent(request_id=answer.request_id, sequence=1, accepted=answer.accepted)
            self.told.setdefault(answer.request_id, []).insert(0, first)
        answered = pb.AttachedAnswer(call=attached.call, answer=answer)
        out.put_nowait(pb.AttachResponse(answers=[answered]))
        if attached.follower and not answer.HasField("rejected"):
            self._follow(attached.follower, answer.request_id, 0, out)

    def _follow(self, name: str, request_id: str, cursor: int, out: Out) -> None:
        followed = pb.Followed(follower=name)
        if request_id in self.told:
            self.followers[name] = (request_id, out)
            followed.missed.extend(e for e in self.told[request_id] if e.sequence > cursor)
        else:
            followed.refused.CopyFrom(Failure(reason="UNKNOWN_REQUEST"))
        out.put_nowait(pb.AttachResponse(followed=[followed]))

    async def GetRequest(self, request: pb.GetRequestRequest, context: Any) -> Any:
        if request.request_id not in self.told:
            await context.abort_with_status(to_status(UnknownRequest(request.request_id)))
        return pb.GetRequestResponse(status=self.status(request.request_id))

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Any) -> Any:
        found = [self.status(name) for name in reversed(self.told)]
        wanted = [s for s in found if request.state in (0, s.metadata.state)]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        more = str(end) if end < len(wanted) else ""
        return pb.ListRequestsResponse(requests=wanted[start:end], next_page_token=more)

    async def DeleteRequest(self, request: pb.DeleteRequestRequest, context: Any) -> Any:
        self.deleted.append(request.request_id)
        return pb.DeleteRequestResponse()

    async def CancelRequest(self, request: pb.CancelRequestRequest, context: Any) -> Any:
        self.cancels.put_nowait(request.request_id)
        return pb.CancelRequestResponse(was_running=True)

    async def WatchCluster(
        self, request: pb.WatchClusterRequest, context: Any
    ) -> AsyncIterator[pb.WatchClusterResponse]:
        while True:
            self._changed.clear()
            yield self.cluster
            try:
                async with asyncio.timeout(_BEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def status(self, request_id: str) -> pb.RequestStatus:
        status = pb.RequestStatus(tenant="acme")
        status.metadata.request_id = request_id
        status.metadata.state = GenerationState.GENERATION_STATE_PROMISED
        for event in self.told[request_id]:
            kind = event.WhichOneof("event")
            if kind == "accepted":
                status.metadata.accepted.CopyFrom(event.accepted)
            elif kind == "progress":
                status.metadata.progress.CopyFrom(event.progress)
                status.metadata.state = GenerationState.GENERATION_STATE_RUNNING
            elif kind in _ENDINGS:
                status.ended.CopyFrom(event)
                status.metadata.state = GenerationState.Value(f"GENERATION_STATE_{kind.upper()}")
        return status

    async def stop(self) -> None:
        """Dies at once: running calls break off."""
        assert self.server is not None
        await self.server.stop(None)

    def workers(self, *names: str) -> None:
        """Lets the gateway see these workers, serving the one model."""
        self.cluster = pb.WatchClusterResponse(
            workers=[pb.WorkerStatus(name=name, state="alive") for name in names],
            models=[EMOJI] if names else [],
        )
        self._changed.set()

    async def tell(self, request_id: str, *events: RequestEvent) -> None:
        """Tells events of a request to whoever follows it, now or later."""
        known = self.told.setdefault(request_id, [])
        for event in events:
            event.request_id = request_id
            event.sequence = (self.term << 32) + len(known) + 2
            known.append(event)
            lines = {id(out): out for name, out in self.followers.values() if name == request_id}
            for out in lines.values():
                out.put_nowait(pb.AttachResponse(events=[event]))

    async def store(self, name: str, content: bytes) -> MediaInfo:
        """Writes a result as a worker does."""
        jetstream = self.bus.jetstream
        try:
            bucket = await jetstream.object_store(self.subjects.media_bucket)
        except NotFoundError:
            bucket = await jetstream.create_object_store(self.subjects.media_bucket)
        await bucket.put(name, content)  # in pieces of 128 KiB
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
async def running_peer(
    bus: Bus, subjects: Subjects, script: Script, term: int = 1
) -> AsyncIterator[Peer]:
    """A peer on a port of its own."""
    peer = Peer(bus, subjects, script, term)
    server = peer.server = grpc.aio.server(options=SERVER_OPTIONS)
    add_ControlServiceServicer_to_server(peer, server)
    peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield peer
    finally:
        for task in tuple(peer.tasks):
            task.cancel()
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
