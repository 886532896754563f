"""The asyncio client of Hocket's public API: what a product backend imports.

    async with HocketClient("127.0.0.1:7433") as hocket:
        picture, finished = await hocket.generate_media("a red fox", shape=(256, 256), deadline_s=5)
        Path("fox.png").write_bytes(picture)

        async for event in hocket.generate("a lighthouse", steps=20, deadline_s=10):
            match event:
                case Accepted(predicted_latency_us=predicted_us): ...
                case Progress(step=step, steps=steps, degree=degree): ...
                case MediaChunk(data=data): ...
                case Finished(on_time=on_time): ...

Errors are those of `hocket.errors`: `InvalidRequest` with every field violation, `Refused` with the
time to retry after, `RequestFailed`, `NotReady`, and `CallFailed` for any other gRPC status. The
current OpenTelemetry span, if there is one, becomes the parent of everything the request does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType

import grpc
from opentelemetry.trace import TracerProvider

from hocket.channels import CHANNEL_OPTIONS
from hocket.errors import CallFailed, from_rpc_error
from hocket.telemetry import client_interceptors
from hocket.v1.generation_pb2 import (
    Accepted,
    CancelRequest,
    Degraded,
    Finished,
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    MediaChunk,
    ModelInfo,
    Progress,
)
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.types_pb2 import GenerationSpec, OnMiss, Shape, Slo

__all__ = ["Event", "HocketClient", "request"]

Event = Accepted | Progress | Degraded | MediaChunk | Finished


class HocketClient:
    """One connection to a gateway; share it between any number of concurrent calls."""

    def __init__(self, address: str, *, tracer_provider: TracerProvider | None = None) -> None:
        """`address` is "host:port". Nothing is sent until the first call.

        `tracer_provider` defaults to OpenTelemetry's global one.
        """
        self._channel = grpc.aio.insecure_channel(
            address, options=CHANNEL_OPTIONS, interceptors=client_interceptors(tracer_provider)
        )
        self._stub = GenerationServiceStub(self._channel)

    async def __aenter__(self) -> HocketClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls that are running end with CANCELLED."""
        await self._channel.close()

    async def generate(
        self,
        prompt: str | GenerateRequest,
        *,
        model: str = "",
        shape: tuple[int, int] | None = None,
        frames: int = 0,
        fps: int = 0,
        media_type: str = "",
        steps: int = 0,
        seed: int | None = None,
        deadline_s: float = 0.0,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Runs one request and yields what happens to it: Accepted, Progress (and Degraded) as the
        steps end, MediaChunk in order, Finished.

        `deadline_s` is the SLO: when the result is due; it never ends the call. `timeout_s` is how
        long the caller listens; after it the request is cancelled, as it is when the iterator is
        closed early. The other options are those of `request`. A whole GenerateRequest can stand in
        for the prompt; options are then ignored but `timeout_s` and `wait_for_ready` (wait for a
        connection instead of failing).
        """
        if isinstance(prompt, str):
            prompt = request(
                prompt,
                model=model,
                shape=shape,
                frames=frames,
                fps=fps,
                media_type=media_type,
                steps=steps,
                seed=seed,
                deadline_s=deadline_s,
            )
        call = self._stub.Generate(prompt, timeout=timeout_s, wait_for_ready=wait_for_ready)
        try:
            async for response in call:
                event = _event(response)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()  # no effect after the end

    async def generate_media(
        self,
        prompt: str | GenerateRequest,
        *,
        model: str = "",
        shape: tuple[int, int] | None = None,
        frames: int = 0,
        fps: int = 0,
        media_type: str = "",
        steps: int = 0,
        seed: int | None = None,
        deadline_s: float = 0.0,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
    ) -> tuple[bytes, Finished]:
        """Runs one request to its end: the result's bytes, and how it went. Options: `generate`."""
        whole = bytearray()
        finished: Finished | None = None
        events = self.generate(
            prompt,
            model=model,
            shape=shape,
            frames=frames,
            fps=fps,
            media_type=media_type,
            steps=steps,
            seed=seed,
            deadline_s=deadline_s,
            timeout_s=timeout_s,
            wait_for_ready=wait_for_ready,
        )
        async for event in events:
            if isinstance(event, MediaChunk):
                whole += event.data
            elif isinstance(event, Finished):
                finished = event
        if finished is None:
            raise CallFailed("DATA_LOSS", "the stream ended before the request had finished")
        return bytes(whole), finished

    async def cancel(self, request_id: str) -> bool:
        """Cancels a request at its next step boundary; whether it was still running."""
        try:
            answer = await self._stub.Cancel(CancelRequest(request_id=request_id))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer.was_running

    async def models(self, *, wait_for_ready: bool = False) -> Sequence[ModelInfo]:
        """The models that living workers serve, the default one first."""
        try:
            answer = await self._stub.ListModels(ListModelsRequest(), wait_for_ready=wait_for_ready)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return tuple(answer.models)


def request(
    prompt: str,
    *,
    model: str = "",
    shape: tuple[int, int] | None = None,
    frames: int = 0,
    fps: int = 0,
    media_type: str = "",
    steps: int = 0,
    seed: int | None = None,
    guidance: float | None = None,
    deadline_s: float = 0.0,
    on_miss: OnMiss.ValueType = OnMiss.ON_MISS_UNSPECIFIED,
    priority: int = 0,
    tenant: str = "",
    idempotency_key: str = "",
    detached: bool = False,
) -> GenerateRequest:
    """A GenerateRequest; what is left out becomes the server's default.

    `shape` is (width, height) in pixels, `frames` and `fps` a video's number of frames and frames
    per second, `media_type` the result's: "image/png", "image/webp" or "video/mp4".
    """
    width, height = shape or (0, 0)
    spec = GenerationSpec(
        model=model,
        prompt=prompt,
        shape=Shape(width=width, height=height, frames=frames, fps=fps),
        steps=steps,
        seed=seed,
        guidance_scale=guidance,
        media_type=media_type,
    )
    return GenerateRequest(
        spec=spec,
        slo=Slo(deadline_us=round(deadline_s * 1e6), on_miss=on_miss),
        priority=priority,
        tenant=tenant,
        idempotency_key=idempotency_key,
        detached=detached,
    )


def _event(response: GenerateResponse) -> Event | None:
    match response.WhichOneof("event"):
        case "accepted":
            return response.accepted
        case "progress":
            return response.progress
        case "media":
            return response.media
        case "finished":
            return response.finished
        case "degraded":
            return response.degraded
        case _:
            return None  # from a newer server
