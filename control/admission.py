"""Admission: who gets a promise.

    offer ──▶ known? answer from the record
          ──▶ no room? QUEUE_FULL, OVERLOADED, at once
          ──▶ waits ──▶ batch: forecast together ──▶ refused, or append ──▶ record, answer, Arrived

All that wait are forecast together, beside the event loop. A promise (append, record, fact) is one
act of this object's own: whoever asked for it may be gone when it is done. Until the append begins
nothing is promised to callers that gave up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.trace import Tracer

from control import translate
from control.driver import Driver
from control.entrance.door import check_submit
from control.requests import refusals, wishes
from control.requests.degrade import ladders
from control.requests.detaching import Detaching
from control.requests.endings import PromiseLog
from control.requests.lifecycle import LifecycleState
from control.requests.offers import AdmissionSettings, Answered, Decided, Offer
from control.requests.records import Record, Records
from control.requests.verdicts import AdmissionCandidate, Verdict, judge, told_us
from control.scaling.newcomers import Newcomers
from control.scheduler.values import Arrived, CancelRequested, Request
from control.workflows.admitting import prepared, taught
from control.workflows.compiled import models_of, workflow_of
from hocket.clock import Clock, unix_ns
from hocket.errors import Refused
from hocket.messaging.stores import EntryTooLarge
from hocket.tracing import spans, telemetry
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, types_pb2

_BATCH_MAX = 512  # forecast together: most of it is for the queue before them
_RESTS = 3  # a forecast costs as much for few as for many: so many times its own time between two
_REST_US_MAX = 40_000
_AT_ONCE = 32  # answers before others on the event loop have a turn
_APPENDS_MAX = 1024  # under way; a broker that stands still holds up no more


class AdmissionControl:
    """One leader's door."""

    def __init__(
        self,
        driver: Driver,
        promises: PromiseLog,
        records: Records,
        served: Callable[[], Mapping[str, generation_pb2.ModelInfo]],
        has_workers: Callable[[], bool],
        clock: Clock,
        tracer: Tracer,
        settings: AdmissionSettings | None = None,
        newcomers: Newcomers | None = None,
    ) -> None:
        """`served`: models that requests may name, by name."""
        self._driver = driver
        self._promises = promises
        self._records = records
        self._served = served
        self._has_workers = has_workers
        self._clock = clock
        self._tracer = tracer
        self._settings = settings or AdmissionSettings()
        self._seen = newcomers or Newcomers()
        self._settled_us = clock.now_us() + self._settings.settle_us
        self._offers: dict[str, Offer] = {}  # by id, until answered
        self._waiting: deque[Offer] = deque()
        self._under_way: dict[str, Request] = {}  # accepted, perhaps not yet at the scheduler
        self._appending = 0
        self._rest_until_us = 0
        self._detaching = Detaching(promises, records)
        self._wake = asyncio.Event()

    def offer(
        self,
        submit: control_pb2.SubmitRequest,
        answered: Answered,
        *,
        wanted: Callable[[], bool] = lambda: True,
        expires_us: int | None = None,
        traceparent: str = "",
    ) -> None:
        """Calls `answered` once, now or later. `expires_us` is absolute; `wanted` is asked before
        anything is promised.
        """
        wish = wishes.digest(submit)
        known = self._records.get(submit.request_id) or self._records.same_key(submit)
        if known is not None:
            self._answer_known(known, submit, wish, answered, wanted, expires_us)
            return
        if submit.known_only:  # whoever is here by now: the request lacks its defaults
            answered(refusals.rejected(submit, refusals.no_workers()), False)
            return
        violations = check_submit(submit)
        if violations:
            answered(refusals.invalid(submit, violations), False)
            return
        if (refusal := self._no_room()) is not None:
            answered(refusals.rejected(submit, refusal), False)
            return
        record = self._records.receive(submit, wish)
        offer = Offer(record, [wanted], [answered], [expires_us], traceparent, unix_ns())
        self._offers[record.id] = offer
        self._waiting.append(offer)
        self._wake.set()

    async def submit(
        self, submit: control_pb2.SubmitRequest, traceparent: str = ""
    ) -> control_pb2.SubmitResponse:
        """Answers one request that lives by itself; a caller that is cancelled gives up."""
        submit.request.detached = True
        answer: asyncio.Future[control_pb2.SubmitResponse] = (
            asyncio.get_running_loop().create_future()
        )

        def answered(response: control_pb2.SubmitResponse, _: bool) -> None:
            if not answer.done():
                answer.set_result(response)

        self.offer(submit, answered, wanted=lambda: not answer.cancelled(), traceparent=traceparent)
        return await answer

    async def cancel(self, request: str) -> None:
        """Its caller wants no answer any more but this: nothing of it shall run. Returns once it is
        refused or promised, where its promise may be on its way to the broker.
        """
        offer = self._offers.get(request)
        if offer is None:
            return
        offer.is_cancelled = True
        if request in self._under_way:
            answered = asyncio.Event()
            offer.answered.append(lambda *_: answered.set())
            await answered.wait()

    def wake(self) -> None:
        """The first workers are there."""
        self._wake.set()

    async def run(self) -> None:
        """Answers until cancelled. Raises what `PromiseLog.append` raises, in a group."""
        slots = asyncio.Semaphore(_APPENDS_MAX)
        async with asyncio.TaskGroup() as appends:
            appends.create_task(self._detaching.run())
            while True:
                for decided in await self._decided(await self._batch()):
                    await slots.acquire()
                    if not decided.offer.is_wanted(self._clock.now_us()):
                        slots.release()
                        self._refuse(decided.offer, refusals.expired())
                        continue
                    self._under_way[decided.request.id] = decided.request
                    append = appends.create_task(self._promise(decided))
                    append.add_done_callback(lambda _: slots.release())

    # ---------------------------------------------------------------------------- known

    def _answer_known(
        self,
        known: Record,
        submit: control_pb2.SubmitRequest,
        wish: bytes,
        answered: Answered,
        wanted: Callable[[], bool],
        expires_us: int | None,
    ) -> None:
        if known.tenant != submit.request.tenant or (known.wish and known.wish != wish):
            answered(refusals.key_reused(submit, known), False)
        elif known.state is LifecycleState.RECEIVED:
            offer = self._offers[known.id]
            offer.wanted.append(wanted)
            offer.expires_us.append(expires_us)
            offer.answered.append(answered)
            if submit.request.detached:
                self._records.detach(known)
        elif known.is_open and submit.request.detached and not known.detached:
            self._detach(known, answered)
        else:
            answered(refusals.repeat(known), True)

    def _detach(self, known: Record, answered: Answered) -> None:
        """For whoever creates an operation that an earlier caller only follows."""
        if self._detaching.is_full:
            full = refusals.overloaded(self._settings.waiting_max)
            answered(refusals.rejected(known.submit, full), True)
            return

        def stored(failure: types_pb2.Failure | None) -> None:
            repeat = refusals.repeat(known)
            answered(refusals.rejected(known.submit, failure) if failure else repeat, True)

        self._detaching.put(known, stored)

    def _no_room(self) -> types_pb2.Failure | None:
        if self._records.taken >= self._settings.open_max:
            return refusals.queue_full(self._settings.open_max)
        if len(self._waiting) >= self._settings.waiting_max:
            return refusals.overloaded(self._settings.waiting_max)
        return None

    # ---------------------------------------------------------------------------- a batch

    async def _batch(self) -> list[Offer]:
        """Those that wait, as many as are forecast together; waits for one, and for workers."""
        while not self._waiting or self._is_settling():
            self._wake.clear()
            if self._waiting:
                await self._wait_until(self._settled_us)
            else:
                await self._wake.wait()
        await self._clock.sleep_until(self._rest_until_us)
        await self._clock.settle()  # whoever comes in this moment goes along
        return [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH_MAX))]

    def _is_settling(self) -> bool:
        """A leader that has just begun has not heard its workers yet."""
        return not self._has_workers() and self._clock.now_us() < self._settled_us

    async def _wait_until(self, at_us: int) -> None:
        for_what = (self._wake.wait(), self._clock.sleep_until(at_us))
        waits = [asyncio.ensure_future(each) for each in for_what]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _decided(self, batch: Sequence[Offer]) -> list[Decided]:
        """Forecasts a batch and answers those that are refused; what to promise to the others."""
        served = self._served()
        now_us = self._driver.stamp()
        offers: list[Offer] = []
        for offer in batch:
            if (failure := self._refusal(offer, served, now_us)) is not None:
                self._refuse(offer, failure)
            else:
                offers.append(offer)
        newcomers = [self._newcomer(offer, served, now_us) for offer in offers]
        if not offers:
            return []
        ahead = tuple(self._under_way.values())
        promised = [self._records.get(request.id) for request in ahead]
        records = [*(r for r in promised if r is not None), *(offer.record for offer in offers)]
        submits = [record.submit for record in records]
        models = {submit.request_id: models_of(submit) for submit in submits}
        verdicts = await self._driver.ask(
            lambda s: judge(
                self._seen.forecasts(taught(s, submits), models), ahead, newcomers, now_us
            ),
            newcomers=len(newcomers),
        )
        self._seen.judged(verdicts.of)
        judged_us = self._clock.now_us()
        self._rest_until_us = judged_us + min(_RESTS * (judged_us - now_us), _REST_US_MAX)
        for request in ahead:
            if request.id in verdicts.arrived or not self._is_unknown_yet(request.id):
                self._under_way.pop(request.id, None)
        decided = []
        depth = self._records.open_count + self._appending
        for offer, verdict in zip(offers, verdicts.of, strict=True):
            if verdict.refused:
                finish_us = told_us(verdict.request, verdict.forecast)
                failure = translate.to_unattainable(
                    verdict.request, finish_us, now_us, hopeless=verdict.hopeless or not depth
                )
                self._refuse(offer, failure)
                continue
            promise = self._to_promise(offer, verdict, now_us, depth)
            decided.append(
                Decided(
                    offer, promise, verdict.request, now_us, verdict.finish_us, not verdict.late
                )
            )
            depth += 1
            if depth % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return decided

    def _is_unknown_yet(self, request: str) -> bool:
        """Whether its arrival may still be on its way to the scheduler."""
        record = self._records.get(request)
        return record is not None and (record.is_open or record.state is LifecycleState.RECEIVED)

    def _refusal(
        self, offer: Offer, served: Mapping[str, generation_pb2.ModelInfo], now_us: int
    ) -> types_pb2.Failure | None:
        if not offer.is_wanted(now_us):
            return refusals.expired()
        failure = prepared(offer.record.submit, served)
        return failure if failure is None or self._has_workers() else refusals.no_workers()

    def _newcomer(
        self, offer: Offer, served: Mapping[str, generation_pb2.ModelInfo], now_us: int
    ) -> AdmissionCandidate:
        submit = offer.record.submit
        spec, slo = submit.request.spec, submit.request.slo
        request = translate.to_request(submit, now_us)
        if slo.on_miss != types_pb2.ON_MISS_DEGRADE or submit.HasField("workflow"):
            return AdmissionCandidate(request)
        return AdmissionCandidate(request, ladders(spec, slo.degrade, served[spec.model]))

    # ---------------------------------------------------------------------------- answers

    def _to_promise(
        self, offer: Offer, verdict: Verdict, now_us: int, depth: int
    ) -> journal_pb2.Promise:
        submit = offer.record.submit
        predicted_us = verdict.finish_us - now_us
        promise = journal_pb2.Promise(
            term=self._promises.term, wish_sha256=offer.record.wish, traceparent=self._span(offer)
        )
        if verdict.degraded:
            translate.make_variant(submit.request.spec, verdict.request)
            promise.degraded.effective_spec.CopyFrom(submit.request.spec)
            promise.degraded.predicted_latency_us = predicted_us
        promise.submit.CopyFrom(submit)
        promise.answer.CopyFrom(
            generation_pb2.Accepted(
                request_id=submit.request_id,
                predicted_latency_us=predicted_us,
                predicted_latency_us_p95=max(0, verdict.forecast.finish_us_p95 - now_us),
                predicted_on_time=not verdict.late,
                trace_id=telemetry.trace_id(promise.traceparent),
                effective_spec=submit.request.spec,
                queue_depth=depth,
                commitment=translate.commitment(submit.request.slo),
                best_effort_wait_us_max=self._settings.best_effort_wait_us_max,
            )
        )
        return promise

    async def _promise(self, decided: Decided) -> None:
        """The one act: stored, known, answered, and on its way to the scheduler."""
        offer, request = decided.offer, decided.request
        self._appending += 1
        stored = decided.promise.submit.request
        stored.detached = offer.record.detached
        try:
            unix_us = await self._promises.append(decided.promise)
        except (Refused, EntryTooLarge) as full:
            self._under_way.pop(request.id, None)
            self._refuse(offer, refusals.of(full))
            return
        finally:
            self._appending -= 1
        self._records.promise(offer.record, decided.promise, decided.accepted_us, unix_us)
        accepted = decided.promise.answer
        # The arrival first: who hears the answer may have left meanwhile, which cancels it.
        self._driver.post(
            Arrived(
                at_us=self._driver.stamp(),
                request=request,
                promised_us=decided.finish_us,
                on_time=decided.on_time,
            ),
            offer.record.submit,
            workflow=workflow_of(offer.record.submit),
        )
        response = control_pb2.SubmitResponse(request_id=request.id, accepted=accepted)
        self._answer(offer, response, detaches=offer.record.detached and not stored.detached)
        if offer.is_cancelled:
            self._driver.post(CancelRequested(at_us=self._driver.stamp(), request=request.id))

    def _refuse(self, offer: Offer, failure: types_pb2.Failure) -> None:
        self._records.refuse(offer.record)
        self._answer(offer, refusals.rejected(offer.record.submit, failure))

    def _answer(
        self, offer: Offer, response: control_pb2.SubmitResponse, *, detaches: bool = False
    ) -> None:
        """`detaches`: one who joined meanwhile leaves it alone, and that is to be stored yet."""
        del self._offers[offer.record.id]
        first, *joined = offer.answered
        first(response, False)
        for answered in joined:
            if detaches:
                self._detach(offer.record, answered)
            else:
                answered(response, True)

    def _span(self, offer: Offer) -> str:
        return telemetry.record_span(
            self._tracer,
            spans.ADMIT,
            start_ns=offer.began_ns,
            end_ns=max(offer.began_ns, unix_ns()),
            parent=offer.traceparent,
            attributes={spans.REQUEST: offer.record.id},
        )
