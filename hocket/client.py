"""The asyncio client of Hocket's public API: what a product backend imports.

    async with HocketClient("10.0.0.1:7433,10.0.0.2:7433") as hocket:
        picture, finished = await hocket.generate_media("a red fox", shape=(256, 256), deadline_s=5)
        Path("fox.png").write_bytes(picture)

        async for event in hocket.generate("a lighthouse", steps=20, deadline_s=10):
            match event:
                case Accepted(predicted_latency_us=predicted_us): ...
                case Progress(step=step, steps=steps, degree=degree): ...
                case MediaChunk(data=data): ...
                case Finished(on_time=on_time): ...

        made = await hocket.create("a harbour at dawn")      # lives by itself
        picture = await hocket.put_input("photo.jpg")        # for a workflow that takes one
        made = await hocket.create("a harbour", workflow="img2img", inputs={"image": picture.name})
        ended = await hocket.wait(made.request_id)
        picture = await hocket.result(made.request_id)

A gateway that dies under a call is no error: the call goes on through the next address, or the same
one when it is back, where it stood, and nothing is made twice.

Errors are those of `hocket.errors`: `InvalidRequest` with every field violation, `Refused` with the
time to retry after, `RequestFailed`, `NotReady`, and `CallFailed` for any other gRPC status. The
current OpenTelemetry span, if there is one, becomes the parent of everything the request does.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Unpack

import grpc
from google.longrunning import operations_pb2 as lro
from google.protobuf.duration_pb2 import Duration
from opentelemetry.trace import TracerProvider

from hocket.errors import CallFailed, HocketError, RequestFailed
from hocket.gateways import Deadline, Gateways
from hocket.generation import PREFIX, Generation, to_generation
from hocket.request_options import Options, request
from hocket.security.caller import Credentials
from hocket.v1.generation_pb2 import (
    Accepted,
    CancelledGeneration,
    CancelRequest,
    CreateGenerationRequest,
    Degraded,
    Finished,
    GenerateRequest,
    GenerateResponse,
    GenerationState,
    GetMediaRequest,
    ListModelsRequest,
    MediaChunk,
    ModelInfo,
    Progress,
    WatchGenerationRequest,
    WatchGenerationResponse,
)
from hocket.v1.types_pb2 import Failure
from hocket.workflow_calls import WorkflowCalls

__all__ = ["Event", "Generation", "HocketClient", "Options", "WatchEvent", "request"]

Event = Accepted | Progress | Degraded | MediaChunk | Finished
WatchEvent = Accepted | Progress | Degraded | Finished | Failure | CancelledGeneration

_GIVE_UP_S = 1.0  # for the cancel of a caller that leaves early
_PATIENCE_S = 60.0


@dataclass
class _Run:
    """How far a call of `generate` has come, over all its connections."""

    wanted: GenerateRequest
    key_is_ours: bool
    accepted: Accepted | None = None
    cursor: str = ""
    media_bytes: int = 0
    over: bool = False  # the request has ended, or is not known to run

    def is_due(self, progress: Progress) -> bool:
        every = max(1, self.wanted.progress_every)
        return progress.step % every == 0 or progress.step == progress.steps


class HocketClient(WorkflowCalls):
    """Connections to gateways; share it between any number of concurrent calls."""

    def __init__(
        self,
        address: str,
        *,
        tracer_provider: TracerProvider | None = None,
        patience_s: float = _PATIENCE_S,
        api_key: str = "",
        tls_ca: str | Path | None = None,
        tls_dir: str | Path | None = None,
    ) -> None:
        """`address` is "host:port", or several with commas. Nothing is sent until the first call.

        `tracer_provider` defaults to OpenTelemetry's global one. `patience_s`: how long a lost
        connection is looked for before a call fails. `api_key`: the tenant's, where gateways ask
        for one. `tls_ca`: file by which the gateway's certificate is checked; `tls_dir`: a folder
        of `hocket certs`, where gateways ask for a certificate, too.
        """
        shown = Credentials(
            api_key, Path(tls_ca) if tls_ca else None, Path(tls_dir) if tls_dir else None
        )
        self._gateways = Gateways(address, tracer_provider, patience_s, shown)

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
        """Closes the connections; calls that are running end with CANCELLED."""
        await self._gateways.close()

    async def generate(
        self,
        prompt: str | GenerateRequest,
        *,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Event, None]:
        """Runs one request and yields what happens to it: Accepted, Progress (and Degraded) as the
        steps end, MediaChunk in order, Finished.

        `deadline_s` among the options is the SLO: when the result is due; it never ends the call.
        `timeout_s` is how long the caller listens; after it the request is cancelled, as it is when
        the iterator is closed early, unless it is detached or has an idempotency key of the
        caller's, by which others may follow it. A whole GenerateRequest can stand in for the
        prompt; options are then ignored. `wait_for_ready` waits for a first connection instead of
        failing.
        """
        run, deadline = _begin(prompt, options), Deadline(timeout_s)
        try:
            first = self._submit(run, deadline, wait_for_ready)
            async with aclosing(first) as events:
                async for event in events:
                    yield event
            if not run.over:
                async with aclosing(self._go_on(run, deadline)) as events:
                    async for event in events:
                        yield event
        except CallFailed:
            raise
        except HocketError:
            run.over = True
            raise
        finally:
            if run.accepted is not None and not run.over and run.key_is_ours:
                await self._give_up(run.accepted.request_id)

    async def generate_media(
        self,
        prompt: str | GenerateRequest,
        *,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
        **options: Unpack[Options],
    ) -> tuple[bytes, Finished]:
        """Runs one request to its end: the result's bytes, and how it went. Options: `generate`."""
        whole = bytearray()
        finished: Finished | None = None
        running = self.generate(
            prompt, timeout_s=timeout_s, wait_for_ready=wait_for_ready, **options
        )
        async with aclosing(running) as events:
            async for event in events:
                if isinstance(event, MediaChunk):
                    whole += event.data
                elif isinstance(event, Finished):
                    finished = event
        if finished is None:
            raise CallFailed("DATA_LOSS", "the stream ended before the request had finished")
        return bytes(whole), finished

    async def create(self, prompt: str | GenerateRequest, **options: Unpack[Options]) -> Generation:
        """Starts a request that lives by itself, whoever follows it."""
        asked = CreateGenerationRequest(request=_begin(prompt, options).wanted)
        answer = await self._gateways.ask(lambda: self._gateways.generation.CreateGeneration(asked))
        return to_generation(answer)

    async def get(self, request_id: str) -> Generation:
        """How a request stands now; raises UnknownRequest."""
        asked = lro.GetOperationRequest(name=PREFIX + request_id)
        return to_generation(
            await self._gateways.ask(lambda: self._gateways.operations.GetOperation(asked))
        )

    async def wait(self, request_id: str, timeout_s: float | None = None) -> Generation:
        """How a request stands at its end, or after `timeout_s`."""
        deadline = Deadline(timeout_s)

        async def question() -> lro.Operation:
            asked = lro.WaitOperationRequest(name=PREFIX + request_id)
            if (left_s := deadline.left_s) is not None:
                asked.timeout.CopyFrom(Duration(nanos=0))
                asked.timeout.FromMicroseconds(round(left_s * 1e6))
            answer: lro.Operation = await self._gateways.operations.WaitOperation(asked)
            return answer

        return to_generation(await self._gateways.ask(question))

    async def watch(
        self, request_id: str, cursor: str = "", *, timeout_s: float | None = None
    ) -> AsyncGenerator[tuple[WatchEvent, str], None]:
        """What happens to a request behind a cursor, each with the cursor behind it, to its end
        (Finished, Failure or CancelledGeneration). Raises UnknownRequest."""
        seen, deadline = cursor, Deadline(timeout_s)

        def opened() -> object:
            asked = WatchGenerationRequest(request_id=request_id, cursor=seen)
            return self._gateways.generation.WatchGeneration(asked, timeout=deadline.left_s)

        async with aclosing(self._gateways.stream(opened)) as responses:
            async for response in responses:
                event = _watch_event(response)
                seen = response.cursor or seen
                if event is not None:
                    yield event, seen

    async def media(
        self, request_id: str, offset: int = 0, *, timeout_s: float | None = None
    ) -> AsyncGenerator[MediaChunk, None]:
        """The result of a request from an offset on, in order; a broken stream is gone on with.

        Raises NotFinished, UnknownRequest, and RequestFailed when it is lost or corrupt.
        """
        at, deadline, first = offset, Deadline(timeout_s), True

        def opened() -> object:
            asked = GetMediaRequest(request_id=request_id, offset=at)
            return self._gateways.generation.GetMedia(asked, timeout=deadline.left_s)

        async with aclosing(self._gateways.stream(opened)) as responses:
            async for response in responses:
                chunk = response.chunk
                at += len(chunk.data)
                if not first:
                    chunk.ClearField("info")
                first = False
                yield chunk

    async def result(self, request_id: str, *, timeout_s: float | None = None) -> bytes:
        """The whole result of a request that finished. Errors: `media`."""
        whole = bytearray()
        async with aclosing(self.media(request_id, timeout_s=timeout_s)) as chunks:
            async for chunk in chunks:
                whole += chunk.data
        return bytes(whole)

    async def cancel(self, request_id: str) -> bool:
        """Cancels a request at its next step boundary; whether it was still running."""
        asked = CancelRequest(request_id=request_id)
        answer = await self._gateways.ask(lambda: self._gateways.generation.Cancel(asked))
        return answer.was_running

    async def delete(self, request_id: str) -> None:
        """Lets the cluster forget a request that has ended."""
        asked = lro.DeleteOperationRequest(name=PREFIX + request_id)
        await self._gateways.ask(lambda: self._gateways.operations.DeleteOperation(asked))

    async def list(
        self, state: GenerationState.ValueType = GenerationState.GENERATION_STATE_UNSPECIFIED
    ) -> AsyncGenerator[Generation, None]:
        """Requests, the newest first; those in one state, or all."""
        wanted = GenerationState.Name(state) if state else ""
        asked = lro.ListOperationsRequest(filter=f"state={wanted}" if wanted else "")
        while True:
            page = await self._gateways.ask(lambda: self._gateways.operations.ListOperations(asked))
            for operation in page.operations:
                yield to_generation(operation)
            if not page.next_page_token:
                return
            asked.page_token = page.next_page_token

    async def models(self, *, wait_for_ready: bool = False) -> Sequence[ModelInfo]:
        """The models that living workers serve, the default one first."""
        asked = ListModelsRequest()
        answer = await self._gateways.ask(
            lambda: self._gateways.generation.ListModels(asked, wait_for_ready=wait_for_ready)
        )
        return tuple(answer.models)

    async def _submit(
        self, run: _Run, deadline: Deadline, wait_for_ready: bool
    ) -> AsyncGenerator[Event, None]:
        """Generate, to its end or to where it broke after acceptance."""

        def opened() -> object:
            return self._gateways.generation.Generate(
                run.wanted, timeout=deadline.left_s, wait_for_ready=wait_for_ready
            )

        stream = self._gateways.stream(opened, enough=lambda: run.accepted is not None)
        async with aclosing(stream) as responses:
            async for response in responses:
                event = _event(response)
                run.cursor = response.cursor or run.cursor
                if isinstance(event, Accepted):
                    run.accepted = event
                elif isinstance(event, MediaChunk):
                    run.media_bytes += len(event.data)
                elif isinstance(event, Finished):
                    run.over = True
                if event is not None:
                    yield event

    async def _go_on(self, run: _Run, deadline: Deadline) -> AsyncGenerator[Event, None]:
        """What is left of a request whose first stream broke."""
        if run.accepted is None:
            raise CallFailed("DATA_LOSS", "the stream ended before the request was accepted")
        name, finished = run.accepted.request_id, None
        watching = self.watch(name, run.cursor, timeout_s=deadline.left_s)
        async with aclosing(watching) as told:
            async for event, _ in told:
                match event:
                    case Progress() if run.is_due(event):
                        yield event
                    case Degraded():
                        yield event
                    case Finished():
                        finished = event
                    case Failure():
                        raise RequestFailed(event.reason, event.message, dict(event.metadata))
                    case CancelledGeneration():
                        told_ = f"the request was cancelled after {event.steps_done} steps"
                        raise RequestFailed("CANCELLED", told_)
        if finished is None:
            raise CallFailed("DATA_LOSS", "the stream ended before the request had finished")
        run.over = True
        begun = run.media_bytes > 0
        media = self.media(name, run.media_bytes, timeout_s=deadline.left_s)
        async with aclosing(media) as chunks:
            async for chunk in chunks:
                if begun:
                    chunk.ClearField("info")
                if chunk.data or not begun:
                    yield chunk
        yield finished

    async def _give_up(self, request_id: str) -> None:
        # Without it the request would run on until control's grace for followers is over.
        asked = CancelRequest(request_id=request_id)
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await self._gateways.generation.Cancel(asked, timeout=_GIVE_UP_S)


def _begin(prompt: str | GenerateRequest, options: Options) -> _Run:
    wanted = GenerateRequest()
    wanted.CopyFrom(request(prompt, **options) if isinstance(prompt, str) else prompt)
    ours = not wanted.idempotency_key
    if ours:
        wanted.idempotency_key = f"client-{secrets.token_hex(16)}"
    return _Run(wanted, key_is_ours=ours and not wanted.detached)


def _event(response: GenerateResponse) -> Event | None:
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind else None  # none of ours: from a newer server


def _watch_event(response: WatchGenerationResponse) -> WatchEvent | None:
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind else None
