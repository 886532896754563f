"""The use cases behind the public API, whatever carries it: check, submit, follow, hand out.

Nothing here knows gRPC's server: requests come in as messages, answers go out as messages and as
typed errors. A caller is one task. When that task is cancelled its caller is gone: the follower
leaves and is expected back, since a connection that broke and a caller that gave up look the same
from here; control waits out the grace before it cancels what nobody waits for. Whoever wants an end
at once says so (`cancel`).

Control may be away for any time. What it has accepted goes on when it is back, and its callers wait
with it, bounded by nothing but their own deadlines; new requests are refused after a while.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from opentelemetry import trace
from opentelemetry.trace import Span, Tracer

from gateway import validation
from gateway import wish as wishes
from gateway.follower import Follower, is_ending
from gateway.line import Line
from gateway.messages import ACCEPTED_CURSOR, told_by_generate, told_by_watch
from gateway.request_ids import request_id
from gateway.waiting import until
from gateway.workflows.names import WantedWorkflow
from gateway.workflows.requests import INPUT_NAME, given
from hocket import clock as clocks
from hocket.clock import Clock
from hocket.errors import (
    BrokerAway,
    ControlUnavailable,
    InvalidRequest,
    NotFinished,
    NotReady,
    NoWorkers,
    Refused,
    RequestFailed,
    UnknownRequest,
    Violation,
)
from hocket.tracing import spans, telemetry
from hocket.v1.control_pb2 import (
    ListRequestsRequest,
    ListRequestsResponse,
    RequestStatus,
    SubmitRequest,
    SubmitResponse,
)
from hocket.v1.generation_pb2 import (
    Accepted,
    Finished,
    GenerateRequest,
    GenerateResponse,
    GenerationMetadata,
    GenerationState,
    MediaChunk,
    ModelInfo,
    WatchGenerationResponse,
)
from hocket.v1.types_pb2 import Failure, MediaInfo
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.checking import INPUTS_MAX
from hocket.workflows.running import run_form

_SEED_BITS = 32


class Control(Protocol):
    """Single questions to the leader. They raise its typed errors, and ControlUnavailable."""

    @property
    def models(self) -> Sequence[ModelInfo]: ...

    @property
    def listed(self) -> Sequence[ModelInfo]: ...

    async def get(self, request_id: str, tenant: str | None) -> RequestStatus: ...

    async def cancel(self, request_id: str, tenant: str | None) -> bool: ...

    async def delete(self, request_id: str, tenant: str | None) -> None: ...

    async def list(self, request: ListRequestsRequest) -> ListRequestsResponse: ...


class MediaSource(Protocol):
    """Where results are."""

    def chunks(self, media: MediaInfo, offset: int = 0) -> AsyncIterator[MediaChunk]: ...


class Workflows(Protocol):
    """Workflows beside those of models."""

    async def wanted(self, name: str, models: Sequence[ModelInfo]) -> WantedWorkflow: ...


class Inputs(Protocol):
    """Files that callers have uploaded."""

    async def absent(
        self, tenant: str, names: Collection[str], needed_us: int
    ) -> frozenset[str]: ...


@dataclass(frozen=True)
class _Wish:
    """A request that can be submitted."""

    effective: GenerateRequest
    workflow: WorkflowSpec | None = None  # as it is run with what the request brings
    absent: NoWorkers | None = None  # what is raised where control knows of no such request


@dataclass(frozen=True)
class Calls:
    """The use cases. Serves any number of callers at once; keeps no state between them."""

    line: Line
    control: Control
    media: MediaSource
    clock: Clock
    tracer: Tracer
    submit_wait_us: int  # how long a new request waits for control's answer
    broker_away: Callable[[], bool] = lambda: False
    workflows: Workflows | None = None  # none: models' own alone
    inputs: Inputs | None = None  # what callers have uploaded

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        """One request from its acceptance to its last piece of media."""
        span = trace.get_current_span()
        span.update_name(spans.GENERATE)
        follower = Follower(_new_id())
        wish = await self._complete(request)
        effective = wish.effective
        _describe(span, follower.request_id, effective)
        try:
            answer = await self._submit(request, wish, follower)
            span.set_attribute(spans.REQUEST, follower.request_id)
            accepted = await self._accepted(answer, effective, span)
            yield GenerateResponse(accepted=accepted, cursor=str(ACCEPTED_CURSOR))
            finished, cursor = Finished(), ""
            if answer.HasField("already_finished"):
                finished = answer.already_finished
            while not finished.HasField("media"):
                event = await follower.next()
                if event.HasField("finished"):
                    finished, cursor = event.finished, str(event.sequence)
                    break
                response = told_by_generate(event, effective.progress_every)
                if response is not None:
                    yield response
            self.line.leave(follower, returns=False)
            async for chunk in self._media(finished.media, 0):
                yield GenerateResponse(media=chunk)
            span.set_attribute(spans.OUTCOME, "finished")
            yield GenerateResponse(finished=finished, cursor=cursor)
        finally:
            self.line.leave(follower, returns=True)

    async def create(self, request: GenerateRequest) -> RequestStatus:
        """A request that lives by itself: its state right after its acceptance, or now, where the
        idempotency key led to an earlier one."""
        wish = await self._complete(request)
        wish.effective.detached = True
        name = _new_id()
        _describe(trace.get_current_span(), name, wish.effective)
        answer = await self._submit(request, wish, None, name)
        if answer.request_id not in ("", name) or not answer.HasField("accepted"):
            return await self.control.get(answer.request_id, None)
        metadata = GenerationMetadata(
            request_id=name,
            state=GenerationState.GENERATION_STATE_PROMISED,
            accepted=answer.accepted,
            cursor=str(ACCEPTED_CURSOR),
        )
        return RequestStatus(metadata=metadata, tenant=request.tenant)

    async def watch(
        self, request_id: str, cursor: str, tenant: str | None = None
    ) -> AsyncGenerator[WatchGenerationResponse, None]:
        """What happens to a request behind `cursor`, to its end.

        Raises UnknownRequest, and InvalidRequest for a cursor that nobody ever gave out.
        """
        seen = _cursor(cursor)
        if seen:  # who has seen the end already is told it once more
            status = await self._known(request_id, tenant)
            if status.HasField("ended") and status.ended.sequence <= seen:
                yield told_by_watch(status.ended)
                return
        follower = Follower(request_id, seen, tenant=tenant)
        self.line.follow(follower)
        try:
            while True:
                event = await follower.next()
                if is_ending(event):
                    self.line.leave(follower, returns=False)
                yield told_by_watch(event)
                if is_ending(event):
                    return
        finally:
            self.line.leave(follower, returns=True)

    async def media_of(
        self, request_id: str, offset: int, tenant: str | None = None
    ) -> AsyncGenerator[MediaChunk, None]:
        """The result of a request that finished; raises NotFinished where there is none."""
        status = await self._known(request_id, tenant)
        if not status.ended.HasField("finished"):
            state = GenerationState.Name(status.metadata.state).removeprefix("GENERATION_STATE_")
            raise NotFinished(request_id, state)
        media = status.ended.finished.media
        if offset > media.size_bytes:
            told = f"found {offset}; allowed: 0 to {media.size_bytes}"
            raise InvalidRequest((Violation("offset", told),))
        async for chunk in self._media(media, offset):
            yield chunk

    async def wait(
        self, request_id: str, wait_us: int | None, tenant: str | None = None
    ) -> RequestStatus:
        """A request's state at its end, or after `wait_us`."""
        status = await self._known(request_id, tenant)
        if status.HasField("ended"):
            return status
        follower = Follower(request_id, onlooker=True, tenant=tenant)
        self.line.follow(follower)
        try:
            if wait_us is None:
                await _ended(follower)
            else:
                await until(self.clock, self.clock.now_us() + wait_us, _ended(follower))
        finally:
            self.line.leave(follower, returns=False)
        return await self._known(request_id, tenant)

    async def _known(self, name: str, tenant: str | None) -> RequestStatus:
        if not name:
            raise UnknownRequest(name)
        return await self.control.get(name, tenant)

    async def _complete(self, request: GenerateRequest) -> _Wish:
        """With its defaults; or as it is, where no worker says what they are, and its key may name
        a request that is under way: control knows."""
        try:
            models = self.control.models
        except NoWorkers as absent:
            if not request.idempotency_key:
                raise
            effective = GenerateRequest()
            effective.CopyFrom(request)
            effective.progress_every = max(1, request.progress_every)
            return _Wish(effective, absent=absent)
        wanted, missing = WantedWorkflow(), frozenset[str]()
        if self.workflows is not None:
            wanted = await self.workflows.wanted(request.spec.workflow, models)
        if wanted.spec is not None and self.inputs is not None:
            named = [name for name in request.spec.inputs.values() if INPUT_NAME.fullmatch(name)]
            needed_us = request.slo.deadline_us
            missing = await self.inputs.absent(request.tenant, named[:INPUTS_MAX], needed_us)
        effective = validation.completed(request, models, wanted, missing)
        if not effective.spec.HasField("seed"):
            effective.spec.seed = secrets.randbits(_SEED_BITS)
        if wanted.spec is None:
            return _Wish(effective)
        return _Wish(effective, run_form(wanted.spec, given(effective.spec)).spec)

    async def _submit(
        self,
        asked: GenerateRequest,
        wish: _Wish,
        follower: Follower | None,
        name: str = "",
    ) -> SubmitResponse:
        """Control's answer."""
        absent = wish.absent
        submit = SubmitRequest(
            request_id=follower.request_id if follower is not None else name,
            request=wish.effective,
            wish_sha256=wishes.digest(asked),
            known_only=absent is not None,
            workflow=wish.workflow,
        )
        span = trace.get_current_span()
        span.add_event(spans.SUBMITTED)
        try:
            answer = await self.line.submit(
                submit, follower, self.submit_wait_us, telemetry.traceparent_of(span)
            )
        except ControlUnavailable:
            raise self._cause() from None
        span.add_event(spans.ANSWERED)
        has_failed = answer.rejected.metadata.get("ended") == "1"
        if absent is not None and answer.HasField("rejected") and not has_failed:
            raise absent
        if answer.HasField("rejected") and not (has_failed and follower is None):
            raise _refusal(answer.rejected)
        return answer

    def _cause(self) -> NotReady:
        """Why a submit got no answer."""
        waited = f"within {self.submit_wait_us / 1e6:g} s"
        if self.broker_away():
            return BrokerAway()
        if not self.line.leader:
            return ControlUnavailable(f"no leader of the control plane was found {waited}")
        return ControlUnavailable(f"the control plane did not answer {waited}")

    async def _accepted(
        self, answer: SubmitResponse, effective: GenerateRequest, span: Span
    ) -> Accepted:
        """What the request that answers was promised: of an earlier one its own seed and trace."""
        accepted = Accepted()
        if answer.HasField("accepted"):
            accepted.CopyFrom(answer.accepted)
        else:
            accepted.CopyFrom((await self.control.get(answer.request_id, None)).metadata.accepted)
        accepted.request_id = accepted.request_id or answer.request_id
        accepted.trace_id = accepted.trace_id or f"{span.get_span_context().trace_id:032x}"
        if not accepted.HasField("effective_spec"):
            accepted.effective_spec.CopyFrom(effective.spec)
        return accepted

    async def _media(self, media: MediaInfo, offset: int) -> AsyncIterator[MediaChunk]:
        # Not the current span: between two chunks the caller's code runs.
        span = self.tracer.start_span(spans.MEDIA_FETCH)
        count = 0
        try:
            async for chunk in self.media.chunks(media, offset):
                count += len(chunk.data)
                yield chunk
        finally:
            span.set_attribute(spans.BYTES, count)
            span.end()


async def _ended(follower: Follower) -> None:
    while not is_ending(await follower.next()):
        pass


def _new_id() -> str:
    return request_id(clocks.unix_ns(), secrets.randbits(80))


def _cursor(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 64):
        allowed = "as a message of this request had it, or empty"
        raise InvalidRequest((Violation("cursor", f"found {text[:40]!r}; allowed: {allowed}"),))
    return int(text)


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


def _refusal(failure: Failure) -> Refused | RequestFailed:
    metadata = dict(failure.metadata)
    if metadata.pop("ended", ""):  # the request that answers had been accepted
        return RequestFailed(failure.reason, failure.message, metadata)
    return Refused(failure.reason, failure.message, failure.retry_after_us, metadata)
