"""Carries the driver's results out: diary, assignments, truncations, progress, endings, spans.

Bound to one term. Of a turn, what was observed goes to the diary before the plan that followed;
workers hear of a plan first and the diary then, which may go. An ending goes to the promises stream
before anybody is told (control/requests/endings.py). Nothing here decides anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from google.protobuf.message import Message
from opentelemetry.trace import Tracer

from control import translate
from control.driver import Observed, Turn
from control.requests.endings import Endings
from control.requests.records import Record, Records
from control.scheduler import values
from control.workers.leases import Leases
from control.workflows.compiled import steps_at
from hocket.clock import unix_ns
from hocket.messaging.bus import Subjects
from hocket.tracing import spans, telemetry
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, mesh_pb2, types_pb2

_TRUNCATES_KEPT = 64  # a worker
_AWAY_MAX = 256  # workers whose lease has ended that may come back
_AT_ONCE = 32  # messages before others on the event loop have a turn


class Diary(Protocol):
    """Where facts and plans are noted; it may go (see control/journal.py)."""

    @property
    def term(self) -> int: ...

    async def note(self, entry: journal_pb2.JournalEntry) -> None: ...


class Sender(Protocol):
    """The bus, as far as this needs it."""

    async def publish(self, subject: str, message: Message) -> None: ...


class Publisher:
    """The driver's outlet in the live system."""

    def __init__(
        self,
        bus: Sender,
        subjects: Subjects,
        diary: Diary,
        records: Records,
        leases: Leases,
        endings: Endings,
        tell: Callable[[mesh_pb2.RequestEvent], None],
        tracer: Tracer,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._diary = diary
        self._records = records
        self._leases = leases
        self._endings = endings
        self._tell = tell
        self._tracer = tracer
        self._term = diary.term
        self._sent = 0
        # As the scheduler was told: what a plan means by a name. Both go with the worker.
        self._incarnations: dict[str, str] = {}
        self._truncates: dict[str, deque[mesh_pb2.Truncate]] = {}  # newest ones, by worker
        # Workers whose lease has ended, oldest first: what was called off since, they may still run
        # when they come back.
        self._away: dict[str, str] = {}  # incarnation, by worker
        self._workflows: set[str] = set()  # names of those that the diary has, in this term

    async def turned(self, turn: Turn) -> None:
        for observed in turn.observed:
            await self._note(observed.fact, observed.note)
            await self._membership(observed.fact)
            if isinstance(observed.note, mesh_pb2.StepReport):
                self._reported(observed, observed.note, turn.finish_us)
            for ended in observed.ended:
                self._ended(ended, observed.note)
        if turn.plan is not None:
            await self._planned(turn.plan, turn.digest, turn.plan_time_us)

    async def _planned(self, plan: values.Plan, digest: str, plan_time_us: int) -> None:
        note = translate.to_plan_record(plan, digest, plan_time_us)
        await self._assign(plan, digest)
        for truncation in plan.truncations:
            for worker in truncation.workers:
                await self._truncate(truncation, worker)
        await self._diary.note(journal_pb2.JournalEntry(stamped_us=plan.now_us, plan=note))
        for assignment in plan.assignments:
            self._trace(plan, digest, assignment)
        for ended in plan.ended:
            self._ended(ended)

    async def truncate_again(self, worker: str) -> None:
        """Repeats the newest truncations to a worker that seems to have missed one."""
        for stop in tuple(self._truncates.get(worker, ())):
            await self._publish(self._subjects.truncate(worker), stop)

    # ---------------------------------------------------------------------------- facts

    async def _note(self, fact: values.Event, note: object) -> None:
        text = msgspec.json.encode(fact).decode()
        entry = journal_pb2.JournalEntry(stamped_us=fact.at_us, observed_json=text)
        if isinstance(fact, values.Arrived) and isinstance(note, control_pb2.SubmitRequest):
            name = fact.request.workflow
            if note.HasField("workflow") and name not in self._workflows:
                self._workflows.add(name)
                entry.workflow.CopyFrom(note.workflow)
        await self._diary.note(entry)
        await self._breathe()

    async def _membership(self, fact: values.Event) -> None:
        if isinstance(fact, values.WorkerUp):
            away = self._away.pop(fact.worker, None)
            if fact.incarnation not in (away, self._incarnations.get(fact.worker)):
                self._truncates.pop(fact.worker, None)  # what they stopped is gone
            self._incarnations[fact.worker] = fact.incarnation
            if away == fact.incarnation:
                await self.truncate_again(fact.worker)
        elif isinstance(fact, values.WorkerLost):
            incarnation = self._incarnations.pop(fact.worker, None)
            if incarnation is None or fact.reason != "lease":
                self._truncates.pop(fact.worker, None)
                return
            self._away[fact.worker] = incarnation
            while len(self._away) > _AWAY_MAX:
                oldest = next(iter(self._away))
                del self._away[oldest]
                self._truncates.pop(oldest, None)

    def _reported(
        self, observed: Observed, report: mesh_pb2.StepReport, finish_us: Mapping[str, int]
    ) -> None:
        """Tells callers how far their requests are, and keeps the name of what was made."""
        for result in report.results:
            record = self._records.get(result.request_id)
            if record is None or not record.is_open or record.id not in observed.counted:
                continue  # ended, or called off: the client hears of what counts
            if result.HasField("media"):
                self._records.made(record.id, result.media)
            elif report.HasField("media") and len(report.results) == 1:  # of an older worker
                self._records.made(record.id, report.media)
            now_us = observed.fact.at_us
            if record.id in finish_us:
                self._records.estimate(record.id, now_us, finish_us[record.id])
            if report.step_time_us and not report.HasField("failure"):
                self._progressed(record, report, result, max(0, record.finish_us - now_us))

    def _progressed(
        self,
        record: Record,
        report: mesh_pb2.StepReport,
        result: mesh_pb2.StepResult,
        left_us: int,
    ) -> None:
        steps = steps_at(record.submit, report.node)
        progress = generation_pb2.Progress(
            node=report.node,
            step=result.steps_done if steps else 1,
            steps=steps or 1,
            degree=len(report.members),
            workers=report.members,
            step_time_us=report.step_time_us[-1],
            predicted_step_time_us=record.predicted_us.get(report.sequence, 0),
            eta_us=left_us,
            resolved_prompt=result.resolved_prompt,
        )
        event = self._records.progress(record.id, progress)
        if event is not None:
            self._tell(event)

    def _ended(self, ended: values.Ended, note: object = None) -> None:
        """`note`: of the fact that ended it; a Failure is what its caller is told, a StepReport of
        a call that was refused says why.
        """
        record = self._records.begin_end(ended.request)
        if record is None:
            return
        said = note if isinstance(note, mesh_pb2.StepReport) else None
        outcome = translate.to_ended(ended, record, said)
        if isinstance(note, types_pb2.Failure):
            outcome.failed.CopyFrom(note)
        self._endings.put(record, outcome)

    # ---------------------------------------------------------------------------- plans

    async def _assign(self, plan: values.Plan, digest: str) -> None:
        by_worker: dict[str, list[mesh_pb2.Assignment]] = {}
        loads: dict[str, list[mesh_pb2.WeightsLoad]] = {}
        for load in plan.loads:
            loads.setdefault(load.worker, []).append(translate.to_weights_load(load))
        load_us = _load_us(plan)
        for assignment in plan.assignments:
            message = translate.to_assignment(
                assignment,
                self._term,
                self._record,
                self._leases.store_address,
                load_us.get(assignment.sequence, 0),
            )
            for worker in assignment.workers:
                by_worker.setdefault(worker, []).append(message)
            await self._breathe()
        fetches = self._fetches(plan)
        for worker in sorted({*by_worker, *fetches}):
            if worker in self._incarnations:  # else it is lost, and its work planned anew
                message_to = mesh_pb2.Assign(
                    term=self._term,
                    round=plan.round,
                    plan_digest=digest,
                    assignments=by_worker.get(worker, ()),
                    fetches=fetches.get(worker, ()),
                    loads=loads.get(worker, ()),
                    incarnation=self._incarnations[worker],
                )
                await self._publish(self._subjects.assign(worker), message_to)

    def _fetches(self, plan: values.Plan) -> dict[str, list[mesh_pb2.LatentFetch]]:
        """By worker: latents that it copies to itself."""
        found: dict[str, list[mesh_pb2.LatentFetch]] = {}
        for fetch in plan.fetches:
            message = translate.to_fetch(
                fetch, self._record(fetch.request), self._leases.store_address
            )
            found.setdefault(fetch.worker, []).append(message)
        return found

    async def _truncate(self, truncation: values.Truncation, worker: str) -> None:
        incarnation = self._incarnations.get(worker) or self._away.get(worker)
        if incarnation is None:
            return
        stop = translate.to_truncate(truncation, self._term, incarnation)
        self._truncates.setdefault(worker, deque(maxlen=_TRUNCATES_KEPT)).append(stop)
        await self._publish(self._subjects.truncate(worker), stop)

    async def _publish(self, subject: str, message: Message) -> None:
        await self._bus.publish(subject, message)
        await self._breathe()

    async def _breathe(self) -> None:
        """A large plan, or a crowd of facts, does not hold the event loop."""
        self._sent += 1
        if self._sent % _AT_ONCE == 0:
            await asyncio.sleep(0)

    def _record(self, request: str) -> Record:
        record = self._records.get(request)
        assert record is not None, f"the scheduler planned the unknown request {request}"
        return record

    def _trace(self, plan: values.Plan, digest: str, assignment: values.Assignment) -> None:
        now_ns = unix_ns()
        for member in assignment.batch:
            record = self._record(member.request)
            if not record.is_open:
                continue  # it ended while the workers were told
            if self._records.run(record.id, assignment.sequence, assignment.step_time_us):
                accepted_ns = min(now_ns, record.accepted_unix_us * 1000)
                self._span(record, spans.QUEUE, accepted_ns, now_ns, {})
            if steps_at(record.submit, assignment.node):
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
                        "hocket.plan": digest,
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
