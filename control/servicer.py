"""ControlService: what gateways and the command line ask of the leader.

`Submit` is the one place where a promise is made: predict, refuse or journal, and only then answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

import grpc
from opentelemetry.trace import Tracer

from control import translate
from control.driver import Driver
from control.journal import Journal
from control.leases import Leases
from control.requests import Record, Records
from control.scheduler.values import Arrived, CancelRequested, DrainRequested
from hocket import spans, telemetry
from hocket.clock import Clock, unix_ns
from hocket.errors import HocketError, UnknownRequest, UnknownWorker, to_status
from hocket.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    journal_pb2,
    types_pb2,
)

_RETRY_NO_WORKERS_US = 2_000_000
_WATCH_WAIT_US = 1_000_000  # a watcher hears at least this often


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Serves one term."""

    def __init__(
        self,
        driver: Driver,
        journal: Journal,
        records: Records,
        leases: Leases,
        clock: Clock,
        tracer: Tracer,
        *,
        policy: str,
        requests_open_max: int,
    ) -> None:
        self._driver = driver
        self._journal = journal
        self._records = records
        self._leases = leases
        self._clock = clock
        self._tracer = tracer
        self._policy = policy
        self._open_max = requests_open_max
        self._admitting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._membership = asyncio.Condition()

    async def Submit(
        self,
        request: control_pb2.SubmitRequest,
        context: grpc.aio.ServicerContext[control_pb2.SubmitRequest, control_pb2.SubmitResponse],
    ) -> control_pb2.SubmitResponse:
        with self._tracer.start_as_current_span(spans.ADMIT) as span:
            span.set_attribute(spans.REQUEST, request.request_id)
            try:
                return await self._admit_once(request)
            except HocketError as error:
                await context.abort_with_status(to_status(error))
                raise AssertionError("abort_with_status raises") from error

    async def _admit_once(self, request: control_pb2.SubmitRequest) -> control_pb2.SubmitResponse:
        if not request.request.idempotency_key:
            return await self._admit(request)
        # Two calls with one key must not both be new.
        key = f"{request.request.tenant}/{request.request.idempotency_key}"
        async with self._admitting.setdefault(key, asyncio.Lock()):
            known = self._records.same_key(request)
            if known is None:
                return await self._admit(request)
            return _repeat(known) if _same_wish(known.submit, request) else _key_reused(request)

    async def CancelRequest(
        self,
        request: control_pb2.CancelRequestRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.CancelRequestRequest, control_pb2.CancelRequestResponse
        ],
    ) -> control_pb2.CancelRequestResponse:
        if self._records.get(request.request_id) is None:
            await context.abort_with_status(to_status(UnknownRequest(request.request_id)))
        running = self._records.is_open(request.request_id)
        if running:
            self._driver.post(
                CancelRequested(at_us=self._driver.stamp(), request=request.request_id)
            )
        return control_pb2.CancelRequestResponse(was_running=running)

    async def DrainWorker(
        self,
        request: control_pb2.DrainWorkerRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.DrainWorkerRequest, control_pb2.DrainWorkerResponse
        ],
    ) -> control_pb2.DrainWorkerResponse:
        lease = self._leases.alive.get(request.worker)
        if lease is None and request.worker not in self._driver.scheduler.draining():
            known = tuple(sorted(self._leases.alive))
            await context.abort_with_status(to_status(UnknownWorker(request.worker, known)))
            raise AssertionError("abort_with_status raises")
        self._driver.post(
            DrainRequested(
                at_us=self._driver.stamp(), worker=request.worker, draining=not request.undo
            )
        )
        await self.membership_changed()
        held = 0 if lease is None else len(lease.heartbeat.latents)
        return control_pb2.DrainWorkerResponse(jobs_held=held)

    async def WatchCluster(
        self,
        request: control_pb2.WatchClusterRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.WatchClusterRequest, control_pb2.WatchClusterResponse
        ],
    ) -> AsyncIterator[control_pb2.WatchClusterResponse]:
        while True:
            yield self._cluster()
            async with self._membership:
                try:
                    async with asyncio.timeout(_WATCH_WAIT_US / 1e6):
                        await self._membership.wait()
                except TimeoutError:
                    continue  # the counts in the message may have changed all the same

    async def membership_changed(self) -> None:
        """Wakes every watcher."""
        async with self._membership:
            self._membership.notify_all()

    async def _admit(self, submit: control_pb2.SubmitRequest) -> control_pb2.SubmitResponse:
        refusal = self._refusal(submit)
        if refusal is not None:
            return _rejected(submit, refusal)
        spec = submit.request.spec
        spec.guidance_branches = translate.branches_of(spec, self._leases.models())
        accepted_us = self._driver.stamp()
        request = translate.to_request(submit.request_id, submit.request, accepted_us)
        finish_us = self._driver.scheduler.predict_finish_us(request, accepted_us)
        late = request.deadline_us is not None and finish_us > request.deadline_us
        if late and submit.request.slo.on_miss == types_pb2.ON_MISS_REJECT:
            return _rejected(submit, translate.to_unattainable(request, finish_us, accepted_us))
        traceparent = telemetry.traceparent()
        accepted = generation_pb2.Accepted(
            request_id=submit.request_id,
            predicted_latency_us=finish_us - accepted_us,
            predicted_on_time=not late,
            trace_id=telemetry.trace_id(traceparent),
            effective_spec=spec,
            queue_depth=self._records.open_count,
        )
        await self._journal.append(
            journal_pb2.JournalEntry(
                stamped_us=accepted_us,
                accepted=journal_pb2.AcceptedRequest(
                    submit=submit, answer=accepted, traceparent=traceparent
                ),
            ),
            message_id=f"{self._journal.term}-{submit.request_id}",
        )
        self._records.add(
            Record(
                submit=submit,
                accepted=accepted,
                accepted_us=accepted_us,
                accepted_unix_ns=unix_ns(),
                traceparent=traceparent,
            )
        )
        self._driver.post(Arrived(at_us=self._driver.stamp(), request=request))
        return control_pb2.SubmitResponse(accepted=accepted, request_id=submit.request_id)

    def _refusal(self, submit: control_pb2.SubmitRequest) -> types_pb2.Failure | None:
        if not self._leases.alive:
            return types_pb2.Failure(
                reason="NO_WORKERS",
                message="no worker has a living lease",
                retry_after_us=_RETRY_NO_WORKERS_US,
            )
        model = submit.request.spec.model
        served = [m.name for m in self._leases.models()]
        if model not in served:
            return types_pb2.Failure(
                reason="MODEL_NOT_SERVED",
                message=f"no living worker serves {model!r}; served: {', '.join(served)}",
            )
        if self._records.open_count >= self._open_max:
            return types_pb2.Failure(
                reason="QUEUE_FULL",
                message=f"{self._open_max} requests are open, which is the most this cluster takes",
                retry_after_us=_RETRY_NO_WORKERS_US,
            )
        return None

    def _cluster(self) -> control_pb2.WatchClusterResponse:
        now_us = self._clock.now_us()
        slow = self._driver.scheduler.slow_workers()
        draining = self._driver.scheduler.draining()
        workers = []
        for name, lease in sorted(self._leases.alive.items()):
            device = lease.heartbeat.device
            state = (
                "suspect"
                if lease.suspect
                else "draining"
                if name in draining
                else "slow"
                if name in slow and slow[name].avoided
                else "alive"
            )
            workers.append(
                control_pb2.WorkerStatus(
                    name=name,
                    device=device.name or device.kind,
                    state=state,
                    heartbeat_age_us=now_us - lease.seen_us,
                    memory_used_bytes=device.memory_used_bytes,
                    memory_total_bytes=device.memory_total_bytes,
                    memory=lease.heartbeat.memory,
                    slowdown=slow[name].factor if name in slow else 1.0,
                )
            )
        return control_pb2.WatchClusterResponse(
            workers=workers,
            term=self._journal.term,
            requests_open=self._records.open_count,
            policy=self._policy,
            models=self._leases.models(),
        )


def _repeat(record: Record) -> control_pb2.SubmitResponse:
    """Answers a repeated call from what became of the first one."""
    answer = control_pb2.SubmitResponse(request_id=record.id)
    if record.ended is None:
        answer.accepted.CopyFrom(record.accepted)
    elif record.ended.HasField("finished"):
        answer.already_finished.CopyFrom(record.ended.finished)
    elif record.ended.HasField("failed"):
        answer.rejected.CopyFrom(record.ended.failed)
    else:
        answer.rejected.reason = "CANCELLED"
        answer.rejected.message = "the first request with this idempotency key was cancelled"
    return answer


def _same_wish(first: control_pb2.SubmitRequest, again: control_pb2.SubmitRequest) -> bool:
    """Whether two calls ask for the same; where no seed was given, each call drew its own."""
    wishes = []
    for submit in (first, again):
        wish = generation_pb2.GenerateRequest()
        wish.CopyFrom(submit.request)
        wish.spec.ClearField("seed")
        wish.spec.ClearField("guidance_branches")
        wish.ClearField("progress_every")
        wishes.append(wish)
    return wishes[0] == wishes[1]


def _key_reused(submit: control_pb2.SubmitRequest) -> control_pb2.SubmitResponse:
    return _rejected(
        submit,
        types_pb2.Failure(
            reason="IDEMPOTENCY_KEY_REUSED",
            message="idempotency_key: an earlier call with this key asked for something else",
        ),
    )


def _rejected(
    submit: control_pb2.SubmitRequest, failure: types_pb2.Failure
) -> control_pb2.SubmitResponse:
    return control_pb2.SubmitResponse(rejected=failure, request_id=submit.request_id)
