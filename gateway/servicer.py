"""GenerationService: the public door.

A Generate call reads from the top: check, submit, tell what happens, hand out the result. Errors
are typed and become statuses in `gateway.error_statuses`. The RPC's deadline bounds how long the
caller listens and nothing else; the SLO never ends a call.
"""

from __future__ import annotations

import asyncio
import contextvars
import secrets
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
from opentelemetry import trace
from opentelemetry.trace import Span

from gateway import validation
from gateway.media import chunks
from gateway.mesh import Mesh
from gateway.request_ids import request_id
from gateway.submission import Submission
from hocket import clock, spans
from hocket.errors import Refused, RequestFailed
from hocket.v1.control_pb2 import CancelRequestRequest, SubmitResponse
from hocket.v1.generation_pb2 import (
    Accepted,
    CancelRequest,
    CancelResponse,
    Finished,
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
    Progress,
)
from hocket.v1.generation_pb2_grpc import GenerationServiceServicer
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import Failure

# In quotes: the class takes parameters in grpc's type stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[GenerateRequest, GenerateResponse]"
_SEED_BITS = 32
_CONTROL_TIMEOUT_S = 10.0


class GenerationServicer(GenerationServiceServicer):
    """Serves any number of calls at once; keeps no state between them."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def Generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncIterator[GenerateResponse]:
        span = trace.get_current_span()
        span.update_name(spans.GENERATE)
        effective = self._complete(request)
        call = Submission(self._mesh, _new_id(), effective)
        _describe(span, call.request_id, effective)
        watch = _CallerWatch(self._mesh, call, detached=request.detached)
        context.add_done_callback(watch.on_done)  # type: ignore[arg-type]
        try:
            answer = await watch.submitted()
            span.set_attribute(spans.REQUEST, call.request_id)
            yield GenerateResponse(accepted=_accepted(answer, effective, span))
            finished: Finished | None = None
            if answer.HasField("already_finished"):
                finished = answer.already_finished
            while finished is None:
                event = await call.next_event()
                if event.HasField("finished"):
                    finished = event.finished
                elif (response := _told(event, effective.progress_every)) is not None:
                    yield response
            watch.ended = True
            with self._mesh.tracer.start_as_current_span(spans.MEDIA_FETCH) as fetch:
                whole = await self._mesh.media.fetch(finished.media)
                fetch.set_attribute(spans.BYTES, len(whole))
            for chunk in chunks(finished.media, whole):
                yield GenerateResponse(media=chunk)
            span.set_attribute(spans.OUTCOME, "finished")
            yield GenerateResponse(finished=finished)
        except (Refused, RequestFailed):
            watch.ended = True
            raise

    async def Cancel(
        self,
        request: CancelRequest,
        context: grpc.aio.ServicerContext[CancelRequest, CancelResponse],
    ) -> CancelResponse:
        wanted = CancelRequestRequest(request_id=request.request_id)
        answer = await self._mesh.cluster.ask(
            lambda control: control.CancelRequest(wanted), _CONTROL_TIMEOUT_S
        )
        return CancelResponse(was_running=answer.was_running)

    async def ListModels(
        self,
        request: ListModelsRequest,
        context: grpc.aio.ServicerContext[ListModelsRequest, ListModelsResponse],
    ) -> ListModelsResponse:
        return ListModelsResponse(models=self._mesh.cluster.models)

    def _complete(self, request: GenerateRequest) -> GenerateRequest:
        with self._mesh.tracer.start_as_current_span(
            spans.VALIDATE, record_exception=False, set_status_on_exception=True
        ):
            effective = validation.completed(request, self._mesh.cluster.models)
        if not effective.spec.HasField("seed"):
            effective.spec.seed = secrets.randbits(_SEED_BITS)
        return effective


class _CallerWatch:
    """Knows whether the caller is still there, and what to do about it once it is not."""

    def __init__(self, mesh: Mesh, call: Submission, *, detached: bool) -> None:
        self._mesh = mesh
        self._call = call
        self._detached = detached
        self._trace = contextvars.copy_context()
        self._submit: asyncio.Task[SubmitResponse] | None = None
        self._joined = ""
        self.ended = False  # control has nothing left to cancel

    async def submitted(self) -> SubmitResponse:
        """Control's answer. Goes on without the caller: what was sent must be cancelled by name."""
        self._submit = self._mesh.background.spawn(self._send(), self._trace)
        answer = await asyncio.shield(self._submit)
        if answer.HasField("rejected"):
            raise _refusal(answer.rejected)
        return answer

    def on_done(self, _: Context) -> None:
        """The call is over, for whatever reason."""
        self._mesh.background.spawn(self._leave(), self._trace)

    async def _send(self) -> SubmitResponse:
        with self._mesh.tracer.start_as_current_span(spans.SUBMIT):
            answer = await self._call.send()
        self._joined = self._call.request_id
        self._mesh.departures.join(self._joined)
        return answer

    async def _leave(self) -> None:
        if self._submit is not None:
            await asyncio.wait((self._submit,))
        await self._call.close()
        last = not self._joined or self._mesh.departures.leave(self._joined)
        keep = self._detached or self.ended or self._mesh.departures.shutting_down
        if self._submit is not None and last and not keep:
            await self._mesh.departures.cancel(self._call.request_id)


def _new_id() -> str:
    return request_id(clock.unix_ns(), secrets.randbits(80))


def _describe(span: Span, name: str, request: GenerateRequest) -> None:
    shape = request.spec.shape
    span.set_attributes(
        {
            spans.REQUEST: name,
            spans.MODEL: request.spec.model,
            spans.SHAPE: f"{shape.width}x{shape.height}",
            spans.STEPS: request.spec.steps,
            spans.DEADLINE_US: request.slo.deadline_us,
            spans.OUTCOME: "caller gone",  # until something better is known
        }
    )


def _accepted(answer: SubmitResponse, request: GenerateRequest, span: Span) -> Accepted:
    accepted = Accepted()
    accepted.CopyFrom(answer.accepted)
    if answer.HasField("already_finished"):
        predicted_us = answer.already_finished.predicted_latency_us
        deadline_us = request.slo.deadline_us
        accepted.predicted_latency_us = predicted_us
        accepted.predicted_on_time = not deadline_us or predicted_us <= deadline_us
    accepted.request_id = accepted.request_id or answer.request_id
    accepted.trace_id = accepted.trace_id or f"{span.get_span_context().trace_id:032x}"
    if not accepted.HasField("effective_spec"):
        accepted.effective_spec.CopyFrom(request.spec)
    return accepted


def _told(event: RequestEvent, progress_every: int) -> GenerateResponse | None:
    match event.WhichOneof("event"):
        case "progress" if _is_due(event.progress, progress_every):
            return GenerateResponse(progress=event.progress)
        case "degraded":
            return GenerateResponse(degraded=event.degraded)
        case "failed":
            raise RequestFailed(event.failed.reason, event.failed.message)
        case "cancelled":
            told = f"the request was cancelled after {event.cancelled.steps_done} steps"
            raise RequestFailed("CANCELLED", told)
        case _:
            return None


def _is_due(progress: Progress, every: int) -> bool:
    return progress.step % every == 0 or progress.step == progress.steps


def _refusal(failure: Failure) -> Refused:
    return Refused(failure.reason, failure.message, failure.retry_after_us, dict(failure.metadata))
