"""Carries the driver's results out: journal, assignments, truncations, request events, spans.

Bound to one term. The order of an assignment's way out is: journal note, then workers; an ending's:
journal, then client. Nothing here decides anything.
"""

from __future__ import annotations

from collections import deque

import msgspec
from opentelemetry.trace import Tracer

from control import translate
from control.journal import Journal
from control.leases import Leases
from control.requests import Record, Records
from control.scheduler import values
from hocket import spans, telemetry
from hocket.bus import Bus, Subjects
from hocket.clock import unix_ns
from hocket.v1 import generation_pb2, journal_pb2, mesh_pb2

_TRUNCATES_KEPT = 64  # a worker


class Publisher:
    """The driver's outlet in the live system."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        journal: Journal,
        records: Records,
        leases: Leases,
        tracer: Tracer,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._journal = journal
        self._records = records
        self._leases = leases
        self._tracer = tracer
        self._truncates: dict[str, deque[mesh_pb2.Truncate]] = {}  # newest ones, by worker

    async def observed(self, event: values.Event) -> None:
        text = msgspec.json.encode(event).decode()
        await self._journal.note(
            journal_pb2.JournalEntry(stamped_us=event.at_us, observed_json=text)
        )

    async def ended(self, ended: values.Ended) -> None:
        record = self._records.get(ended.request)
        if record is None or record.ended is not None:
            return
        event = translate.to_ending(ended, record, record.spec.steps)
        outcome = journal_pb2.EndedRequest(request_id=ended.request)
        if event.HasField("finished"):
            outcome.finished.CopyFrom(event.finished)
        elif event.HasField("failed"):
            outcome.failed.CopyFrom(event.failed)
        else:
            outcome.cancelled.steps_done = event.cancelled.steps_done
        await self._journal.note(journal_pb2.JournalEntry(stamped_us=ended.at_us, ended=outcome))
        await self._tell(record, event)
        self._records.end(record.id, event)

    async def planned(self, plan: values.Plan, plan_time_us: int) -> None:
        note = translate.to_plan_record(plan, plan_time_us)
        for message, worker in self._assigns(plan):
            await self._bus.publish(self._subjects.assign(worker), message)
        for truncation in plan.truncations:
            stop = translate.to_truncate(truncation, self._journal.term)
            for worker in truncation.workers:
                self._truncates.setdefault(worker, deque(maxlen=_TRUNCATES_KEPT)).append(stop)
                await self._bus.publish(self._subjects.truncate(worker), stop)
        await self._journal.note(journal_pb2.JournalEntry(stamped_us=plan.now_us, plan=note))
        for assignment in plan.assignments:
            self._trace(plan, assignment)

    async def truncate_again(self, worker: str) -> None:
        """Repeats the newest truncations to a worker that seems to have missed one."""
        for stop in self._truncates.get(worker, ()):
            await self._bus.publish(self._subjects.truncate(worker), stop)

    async def progressed(self, report: mesh_pb2.StepReport, eta_us: dict[str, int]) -> None:
        """Tells callers how far their requests are; `eta_us` names those that shall hear."""
        denoising = report.node == values.DIT
        for result in report.results:
            record = self._records.get(result.request_id)
            if record is None or record.id not in eta_us or not report.step_time_us:
                continue
            progress = generation_pb2.Progress(
                node=report.node,
                step=result.steps_done if denoising else 1,
                steps=record.spec.steps if denoising else 1,
                degree=len(report.members),
                workers=report.members,
                step_time_us=report.step_time_us[-1],
                predicted_step_time_us=record.predicted_us.get(report.sequence, 0),
                eta_us=eta_us[record.id],
                resolved_prompt=result.resolved_prompt,
            )
            await self._tell(record, mesh_pb2.RequestEvent(request_id=record.id, progress=progress))

    async def _tell(self, record: Record, event: mesh_pb2.RequestEvent) -> None:
        record.events += 1
        event.sequence = record.events
        await self._bus.publish(self._subjects.event(record.id), event)

    def _assigns(self, plan: values.Plan) -> list[tuple[mesh_pb2.Assign, str]]:
        by_worker: dict[str, list[mesh_pb2.Assignment]] = {}
        load_us = _load_us(plan)
        for assignment in plan.assignments:
            message = translate.to_assignment(
                assignment,
                self._journal.term,
                self._record,
                self._leases.store_address,
                load_us.get(assignment.sequence, 0),
            )
            for worker in assignment.workers:
                by_worker.setdefault(worker, []).append(message)
        for fetch in plan.fetches:
            by_worker.setdefault(fetch.worker, [])
        if plan.released:
            for worker in self._leases.alive:
                by_worker.setdefault(worker, [])
        return [
            (self._assign(plan, by_worker[worker], worker), worker) for worker in sorted(by_worker)
        ]

    def _assign(
        self, plan: values.Plan, items: list[mesh_pb2.Assignment], worker: str
    ) -> mesh_pb2.Assign:
        return mesh_pb2.Assign(
            term=self._journal.term,
            round=plan.round,
            plan_digest=plan.digest,
            assignments=items,
            released=plan.released,
            loads=[translate.to_weights_load(load) for load in plan.loads if load.worker == worker],
            fetches=[
                translate.to_fetch(f, self._record(f.request), self._leases.store_address)
                for f in plan.fetches
                if f.worker == worker
            ],
        )

    def _record(self, request: str) -> Record:
        record = self._records.get(request)
        assert record is not None, f"the scheduler planned the unknown request {request}"
        return record

    def _trace(self, plan: values.Plan, assignment: values.Assignment) -> None:
        now_ns = unix_ns()
        for member in assignment.batch:
            record = self._record(member.request)
            record.predicted_us[assignment.sequence] = assignment.step_time_us
            if not record.first_run:
                record.first_run = True
                self._span(record, spans.QUEUE, record.accepted_unix_ns, now_ns, {})
            if assignment.node == values.DIT:
                self._span(
                    record,
                    spans.ROUND,
                    now_ns,
                    now_ns + 1000 * max(0, assignment.end_us - assignment.start_us),
                    {
                        spans.ROUND_NUMBER: plan.round,
                        spans.DEGREE: len(assignment.workers),
                        spans.WORKERS: list(assignment.workers),
                        spans.STEPS: assignment.steps,
                        spans.PREDICTED_US: assignment.step_time_us,
                        "hocket.first_step": member.first_step,
                        "hocket.reason": assignment.reason,
                        "hocket.plan": plan.digest,
                    },
                )

    def _span(
        self,
        record: Record,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, int | str | list[str]],
    ) -> None:
        telemetry.record_span(
            self._tracer,
            name,
            start_ns=start_ns,
            end_ns=end_ns,
            parent=record.traceparent,
            attributes={spans.REQUEST: record.id, **attributes},
        )


def _load_us(plan: values.Plan) -> dict[int, int]:
    """By assignment: until its slowest member has loaded what it needs."""
    each: dict[tuple[int, str], int] = {}
    for load in plan.loads:
        key = (load.sequence, load.worker)
        each[key] = each.get(key, 0) + load.load_us
    slowest: dict[int, int] = {}
    for (sequence, _), load_us in each.items():
        slowest[sequence] = max(slowest.get(sequence, 0), load_us)
    return slowest
