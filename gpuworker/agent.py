"""The asyncio side of a worker: broker in, executor, broker out. It never runs a step and never
blocks.

    assign / truncate ──▶ executor ──▶ RunNote ──▶ report (+ media into the object store, + spans)
    heartbeat every few hundred ms, whatever the executor is doing

Reports leave in the order in which the executor gave them. A decode's report waits for its file to
be stored, since a finished request must have a fetchable result; nothing behind it waits, nor the
other jobs of a batch: each is reported by itself, and the last to be stored ends the assignment.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import nats.errors
import nats.js.errors
from nats.js.api import ObjectStoreConfig
from nats.js.errors import NotFoundError
from nats.js.object_store import ObjectStore
from opentelemetry.trace import Tracer

from gpuworker.config import WorkerSettings
from gpuworker.executor import Executor, RunNote
from hocket import spans, telemetry
from hocket.bus import Bus, Subjects
from hocket.clock import Clock, unix_ns
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0
_MEDIA_KEPT_S = 24 * 3600.0  # finished media can be fetched again for a day
_STORE_WAITS_US = (0, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)  # before each try


@dataclass
class _Storing:
    """The files of an assignment that are on their way to the store."""

    under_way: int = 0
    all_made: bool = False  # nothing more will come


class Agent:
    """One worker's voice on the bus."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        bus: Bus,
        executor: Executor,
        clock: Clock,
        tracer: Tracer,
    ) -> None:
        self.name = name
        self.incarnation = secrets.token_hex(8)
        self._settings = settings
        self._bus = bus
        self._subjects = Subjects(settings.cluster)
        self._executor = executor
        self._clock = clock
        self._tracer = tracer
        self._notes: asyncio.Queue[RunNote] = asyncio.Queue()
        self._beats = 0
        self._reports = 0
        self._storing: dict[tuple[int, int], _Storing] = {}  # by term and sequence

    async def run(self) -> None:
        """Serves until cancelled; then says goodbye, so that the lease ends at once."""
        loop = asyncio.get_running_loop()
        self._executor.start(
            lambda note: void(loop.call_soon_threadsafe(self._notes.put_nowait, note))
        )
        subjects = self._subjects
        await self._bus.subscribe(subjects.assign(self.name), mesh_pb2.Assign, self._on_assign)
        await self._bus.subscribe(
            subjects.truncate(self.name), mesh_pb2.Truncate, self._on_truncate
        )
        await self._bus.serve(
            subjects.latent(self.name), mesh_pb2.LatentRequest, self._executor.offer_latent
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                tasks.create_task(self._report_all())
        finally:
            await self._say_goodbye()

    async def _on_assign(self, assign: mesh_pb2.Assign) -> None:
        if not self._executor.accept_term(assign.term):
            return
        self._executor.plan_loads(assign.loads)
        for assignment in assign.assignments:
            self._executor.submit(assignment)
        for request in assign.released:
            self._executor.release(request)

    async def _on_truncate(self, truncate: mesh_pb2.Truncate) -> None:
        if self._executor.accept_term(truncate.term):
            self._executor.truncate(truncate)

    # ------------------------------------------------------------------------------------------
    # heartbeats

    async def _beat(self) -> None:
        while True:
            await self._bus.publish(self._subjects.heartbeat(self.name), self._heartbeat())
            await self._clock.sleep_until(self._clock.now_us() + self._settings.heartbeat_us)

    def _heartbeat(self, leaving: bool = False) -> mesh_pb2.Heartbeat:
        self._beats += 1
        term, sequence = self._executor.progress()
        return mesh_pb2.Heartbeat(
            worker=self.name,
            incarnation=self.incarnation,
            sequence=self._beats,
            device=self._executor.device,
            models=self._executor.models,
            latents=self._executor.held(),
            store_address=self._executor.store_address,
            term=term,
            assignment_sequence=sequence,
            leaving=leaving,
            host=self._settings.host,
            pending_sequences=sorted(
                {*self._executor.pending(), *(s for t, s in self._storing if t == term)}
            ),
            memory=self._executor.memory,
        )

    async def _say_goodbye(self) -> None:
        goodbye = self._heartbeat(leaving=True)
        with suppress(nats.errors.Error, OSError, TimeoutError):  # the lease ends by itself too
            async with asyncio.timeout(_GOODBYE_S):
                await self._bus.publish(self._subjects.heartbeat(self.name), goodbye)
                await self._bus.flush()

    # ------------------------------------------------------------------------------------------
    # reports

    async def _report_all(self) -> None:
        async with asyncio.TaskGroup() as uploads:
            while True:
                note = await self._notes.get()
                key = (note.assignment.term, note.assignment.sequence)
                if note.media:
                    storing = self._storing.setdefault(key, _Storing())
                    storing.under_way += len(note.media)
                    storing.all_made = note.last
                    for member in note.assignment.batch:
                        if member.request_id in note.media:
                            uploads.create_task(self._store_and_report(note, member, storing))
                elif note.last and (storing := self._storing.get(key, _Storing())).under_way:
                    storing.all_made = True  # the last file to be stored ends the assignment
                    if note.failure is not None:
                        await self._report(replace(note, last=False))
                else:
                    await self._report(note)
                    if note.last:
                        self._storing.pop(key, None)

    async def _store_and_report(
        self, note: RunNote, member: mesh_pb2.BatchMember, storing: _Storing
    ) -> None:
        request, start_ns = member.request_id, unix_ns()
        media = note.media[request]
        info = types_pb2.MediaInfo()
        info.CopyFrom(media.info)
        info.sha256 = hashlib.sha256(media.content).hexdigest()
        info.size_bytes = len(media.content)
        info.object_name = request
        problem = await self._store(info.object_name, media.content)
        storing.under_way -= 1
        last = storing.all_made and not storing.under_way
        if problem is not None:
            await self._report(_not_stored(note, request, problem, last=last))
        else:
            telemetry.record_span(
                self._tracer,
                spans.PUBLISH,
                start_ns=start_ns,
                end_ns=unix_ns(),
                parent=member.traceparent,
                attributes={
                    spans.REQUEST: request,
                    spans.WORKER: self.name,
                    spans.BYTES: info.size_bytes,
                },
            )
            await self._report(_only(note, request, last=last), {request: info})
        if last:
            self._storing.pop((note.assignment.term, note.assignment.sequence), None)

    async def _store(self, name: str, media: bytes) -> str | None:
        """Puts media into the object store; after several tries in vain, what the matter is."""
        problem = ""
        for wait_us in _STORE_WAITS_US:
            await self._clock.sleep_until(self._clock.now_us() + wait_us)
            try:
                store = await media_store(self._bus, self._subjects)
                await store.put(name, io.BytesIO(media))
            except (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
                log.warning("cannot store the media of %s yet: %s", name, problem)
            else:
                return None
        return problem

    async def _report(
        self, note: RunNote, media: Mapping[str, types_pb2.MediaInfo] | None = None
    ) -> None:
        assignment = note.assignment
        self._reports += 1
        report = mesh_pb2.StepReport(
            worker=self.name,
            incarnation=self.incarnation,
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
        )
        if note.failure is not None:
            report.failure.metadata["suspects"] = ",".join(note.suspects)
        await self._bus.publish(self._subjects.report(self.name), report)
        self._trace(note)

    def _trace(self, note: RunNote) -> None:
        assignment = note.assignment
        denoising = assignment.node == "dit"
        for member in (m for m in assignment.batch if m.request_id in note.behind):
            common: dict[str, str | int | list[str]] = {
                spans.REQUEST: member.request_id,
                spans.MODEL: member.spec.model,
                spans.NODE: assignment.node,
                spans.WORKER: self.name,
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


async def media_store(bus: Bus, subjects: Subjects) -> ObjectStore:
    """The cluster's bucket for finished media, made on first use."""
    try:
        return await bus.jetstream.object_store(subjects.media_bucket)
    except NotFoundError:
        config = ObjectStoreConfig(bucket=subjects.media_bucket, ttl=_MEDIA_KEPT_S)
        return await bus.jetstream.create_object_store(subjects.media_bucket, config)


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
        failure=types_pb2.Failure(
            reason="MEDIA_NOT_STORED", message=problem, metadata={"request": request}
        ),
    )


def _side_us(note: RunNote, name: str) -> int:
    return sum(s.end_unix_ns - s.start_unix_ns for s in note.sides if s.name == name) // 1000


def _members_us(note: RunNote) -> list[int]:
    """Step by step, each member's own time; nothing where no step's are known."""
    if not any(step.members_us for step in note.steps):
        return []
    unknown = (0,) * len(note.assignment.group.members)
    return [own_us for step in note.steps for own_us in step.members_us or unknown]


def void(_: object) -> None:
    """Takes a result that nobody wants, so that a callback's type stays honest."""
