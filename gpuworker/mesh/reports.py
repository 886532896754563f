"""Notes become reports, media become stored files, steps become spans.

Reports leave in the order in which the executor gave them. A decode's report waits for its file to
be stored, since a finished request must have a fetchable result; nothing behind it waits, nor the
other jobs of a batch: each is reported by itself, and the last to be stored ends the assignment.

While the broker is away reports wait here, in order; what the executor tells meanwhile waits in the
outbox. A file that cannot be stored is that job's failure, whatever the reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import nats.errors
from opentelemetry.trace import Tracer

from gpuworker.executor import RunNote, failure_of
from gpuworker.mesh.media_bucket import MediaBucket
from gpuworker.mesh.outbox import NoteOutbox
from gpuworker.operations.names import operation_of
from hocket.clock import Clock, unix_ns
from hocket.messaging.bus import Bus, Subjects
from hocket.tracing import spans, telemetry
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

_UPLOADS_MAX = 8  # at once
_AGAIN_US = 100_000  # until a report is handed to the bus again that had no room for it


@dataclass
class _Storing:
    """The files of an assignment that are on their way to the store."""

    under_way: int = 0
    all_made: bool = False  # nothing more will come


class Reports:
    """Of one worker's process."""

    def __init__(
        self,
        worker: str,
        incarnation: str,
        bus: Bus,
        subjects: Subjects,
        clock: Clock,
        tracer: Tracer,
        bucket: MediaBucket,
    ) -> None:
        self.outbox = NoteOutbox()
        self._worker = worker
        self._incarnation = incarnation
        self._bus = bus
        self._subject = subjects.report(worker)
        self._clock = clock
        self._tracer = tracer
        self._bucket = bucket
        self._reports = 0
        self._storing: dict[tuple[int, int], _Storing] = {}  # by term and sequence
        self._uploads = asyncio.Semaphore(_UPLOADS_MAX)

    def pending(self, term: int) -> set[int]:
        """Assignments of a term whose end is still to be told, by sequence number."""
        storing = (sequence for known, sequence in self._storing if known == term)
        return {*storing, *self.outbox.untold(term)}

    @property
    def is_idle(self) -> bool:
        """Whether everything has been told and stored."""
        return self.outbox.is_empty and not self._storing

    async def run(self) -> None:
        """Tells of every note, until cancelled."""
        async with asyncio.TaskGroup() as uploads:
            while True:
                note = await self.outbox.take()
                key = (note.assignment.term, note.assignment.sequence)
                if note.media:
                    storing = self._storing.setdefault(key, _Storing())
                    storing.under_way += len(note.media)
                    storing.all_made = note.last
                    for member in note.assignment.batch:
                        if member.request_id in note.media:
                            await self._uploads.acquire()
                            uploads.create_task(self._store_and_report(note, member, storing))
                elif note.last and (storing := self._storing.get(key, _Storing())).under_way:
                    storing.all_made = True  # the last file to be stored ends the assignment
                    if note.failure is not None:
                        await self._report(replace(note, last=False))
                else:
                    await self._report(note)
                    if note.last:
                        self._storing.pop(key, None)
                self.outbox.told(note)

    async def _store_and_report(
        self, note: RunNote, member: mesh_pb2.BatchMember, storing: _Storing
    ) -> None:
        request, problem = member.request_id, ""
        info = types_pb2.MediaInfo()
        try:
            info = await self._stored(note, member)
        except Exception as error:  # told below: it ends this job, not the worker
            log.exception("the media of %s are not stored", request)
            problem = str(error) or type(error).__name__
        finally:
            self._uploads.release()
        storing.under_way -= 1
        last = storing.all_made and not storing.under_way
        if problem:
            await self._report(_not_stored(note, request, problem, last=last))
        else:
            await self._report(_only(note, request, last=last), {request: info})
        if last:
            self._storing.pop((note.assignment.term, note.assignment.sequence), None)

    async def _stored(self, note: RunNote, member: mesh_pb2.BatchMember) -> types_pb2.MediaInfo:
        """Stores one file; what is known of it. Raises what was in the way."""
        request, start_ns = member.request_id, unix_ns()
        media, info = note.media[request], types_pb2.MediaInfo()
        info.CopyFrom(media.info)
        digest = await asyncio.to_thread(hashlib.sha256, media.content)  # not on the loop
        info.sha256 = digest.hexdigest()
        info.size_bytes = len(media.content)
        info.object_name = request
        await self._bucket.put(info.object_name, media.content)
        telemetry.record_span(
            self._tracer,
            spans.PUBLISH,
            start_ns=start_ns,
            end_ns=unix_ns(),
            parent=member.traceparent,
            attributes={
                spans.REQUEST: request,
                spans.WORKER: self._worker,
                spans.BYTES: info.size_bytes,
            },
        )
        return info

    async def _report(
        self, note: RunNote, media: Mapping[str, types_pb2.MediaInfo] | None = None
    ) -> None:
        assignment = note.assignment
        self._reports += 1
        report = mesh_pb2.StepReport(
            worker=self._worker,
            incarnation=self._incarnation,
            term=assignment.term,
            sequence=assignment.sequence,
            node=assignment.node,
            results=_results(note, media or {}),
            members=assignment.group.members,
            step_time_us=[step.duration_us for step in note.steps],
            last=note.last,
            failure=note.failure,
            group_time_us=_side_us(note, spans.GROUP),
            transfer_time_us=_side_us(note, spans.TRANSFER),
            load_time_us=sum(int(s.attributes.get(spans.WAITED_US, 0)) for s in note.sides),
            report_sequence=self._reports,
            member_time_us=_members_us(note),
            failed_job=note.failed_job,
        )
        await self._send(report)
        self._trace(note)

    async def _send(self, report: mesh_pb2.StepReport) -> None:
        """Hands a report to the bus, which drops and counts what it has no room for: then again.

        In a rare race it is handed over twice; its number tells.
        """
        while True:
            drops = self._bus.drops
            try:
                await self._bus.publish(self._subject, report)
            except nats.errors.MaxPayloadError:
                log.exception("a report that no broker takes: control will ask for its steps again")
                return
            if self._bus.drops == drops:
                return
            await self._clock.sleep_until(self._clock.now_us() + _AGAIN_US)

    def _trace(self, note: RunNote) -> None:
        assignment = note.assignment
        operation = operation_of(assignment)
        denoising = operation.stepped
        for member in (m for m in assignment.batch if m.request_id in note.behind):
            common: dict[str, str | int | list[str]] = {
                spans.REQUEST: member.request_id,
                spans.MODEL: member.spec.model,
                spans.NODE: assignment.node,
                spans.OPERATION: operation.name,
                spans.WORKER: self._worker,
                spans.WORKERS: list(assignment.group.members),
                spans.DEGREE: len(assignment.group.members),
            }
            for side in note.sides:
                telemetry.record_span(
                    self._tracer,
                    side.name,
                    start_ns=side.start_unix_ns,
                    end_ns=side.end_unix_ns,
                    parent=member.traceparent,
                    attributes={**common, **side.attributes},
                )
            behind = note.behind[member.request_id]
            for step in note.steps:
                if denoising and member.first_step + step.step >= behind:
                    break  # it had left the batch
                telemetry.record_span(
                    self._tracer,
                    spans.STEP,
                    start_ns=step.start_unix_ns,
                    end_ns=step.end_unix_ns,
                    parent=member.traceparent,
                    attributes={
                        **common,
                        spans.STEP_INDEX: member.first_step + step.step + 1 if denoising else 1,
                        spans.STEPS: member.steps_total if denoising else 1,
                        spans.PREDICTED_US: assignment.predicted_step_time_us,
                        spans.SEQUENCE: assignment.sequence,
                        **({spans.MEMBERS_US: step.members_us} if step.members_us else {}),
                    },
                )


def _results(note: RunNote, media: Mapping[str, types_pb2.MediaInfo]) -> list[mesh_pb2.StepResult]:
    """Where the jobs stand; nothing for one of which this worker holds no latent."""
    return [
        mesh_pb2.StepResult(
            request_id=member.request_id,
            attempt=member.attempt,
            steps_done=note.behind[member.request_id],
            media=media.get(member.request_id),
            resolved_prompt=note.resolved.get(member.request_id, ""),
        )
        for member in note.assignment.batch
        if member.request_id in note.behind
    ]


def _only(note: RunNote, request: str, *, last: bool) -> RunNote:
    """What a note says of one job; of those made in one call, the first tells its time."""
    if len(note.media) == 1:
        return replace(note, last=last)
    first = next(iter(note.media)) == request
    behind = {request: note.behind[request]}
    return replace(note, behind=behind, steps=note.steps if first else (), last=last)


def _not_stored(note: RunNote, request: str, problem: str, *, last: bool) -> RunNote:
    return RunNote(
        assignment=note.assignment,
        behind={request: note.behind[request]},
        last=last,
        failure=failure_of("MEDIA_NOT_STORED", problem),
        failed_job=mesh_pb2.FailedJob(request_id=request, batch=len(note.assignment.batch)),
    )


def _side_us(note: RunNote, name: str) -> int:
    return sum(s.end_unix_ns - s.start_unix_ns for s in note.sides if s.name == name) // 1000


def _members_us(note: RunNote) -> list[int]:
    """Step by step, each member's own time; nothing where no step's are known."""
    if not any(step.members_us for step in note.steps):
        return []
    unknown = (0,) * len(note.assignment.group.members)
    return [own_us for step in note.steps for own_us in step.members_us or unknown]
