"""Calls that are made once: each job's by itself, on one worker.

What a call makes goes onto the shelf, or becomes a file beside the compute thread (encoding.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.executor import Media, RunNote, StepNote, Stopwatch
from gpuworker.memory.latents import LatentShelf
from gpuworker.operations.making import MAKERS, JobCall, pixels_artifact, pixels_of
from gpuworker.operations.names import Operation, OperationRefused, artifact_of
from gpuworker.operations.pictures import Pixels
from gpuworker.state import LatentState
from gpuworker.steps import media
from gpuworker.steps.decode import Decodes
from gpuworker.steps.encoding import EncodingThreads, NotesInOrder
from gpuworker.steps.failing import Failures
from gpuworker.steps.gathering import Gathering
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.pace import StepPace
from gpuworker.steps.run import Run
from hocket.tracing import spans, telemetry
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

Maker = Callable[[JobCall], LatentState]


class Truncated(Exception):
    """A job of one step was called off before it began."""


class OnceCalls:
    """Of one worker."""

    def __init__(
        self,
        inbox: Inbox,
        shelf: LatentShelf,
        groups: GroupCache,
        gathering: Gathering,
        failures: Failures,
        pace: StepPace,
        encoding: EncodingThreads,
    ) -> None:
        self._inbox = inbox
        self._shelf = shelf
        self._groups = groups
        self._gathering = gathering
        self._failures = failures
        self._pace = pace
        self._encoding = encoding
        self._decodes = Decodes()
        self._makers: dict[str, Maker] = {**MAKERS, "decode": self._decoded}
        self._frames = {"vae": self._decode, "make_media": _pixels}

    def run(self, run: Run, operation: Operation, notes: NotesInOrder) -> RunNote | None:
        """Makes every job's call. What it returns is still to be told; None: files are being made,
        which end it. Raises `Truncated` where no job is left.
        """
        if operation.file:
            return self._make_files(run, operation, notes)
        return self._make(run, operation, notes)

    def _make(self, run: Run, operation: Operation, notes: NotesInOrder) -> RunNote:
        jobs = self._gathering.jobs(run, operation, notes, told_later=False)
        began, maker, resolved = self._pace.start(), self._makers[operation.name], {}
        watch, before = Stopwatch(), _texts_of(jobs)
        made: list[LatentState] = []
        for member in tuple(run.members):
            if not self._stays(run, member):
                run.leave(member)
                continue
            job = jobs[member.request_id]
            try:
                made.append(maker(job))
            except Exception as error:
                self._failures.give_up(run, member, error, notes)
                continue
            if operation.part == "text":
                asked = job.text("prompt") if member.HasField("call") else member.spec.prompt
                if (given := job.model.resolve(asked)) != asked:
                    resolved[member.request_id] = given
        if not run.members:
            raise Truncated
        note = self._pace.wait(self._pace.end(began, 0))
        for member, state in zip(run.members, made, strict=True):
            self._shelf.put(member.request_id, state, artifact_of(member))
        self._groups.acknowledge()
        texts = _texts_of(jobs)
        if texts.encoded == before.encoded and texts.recalled > before.recalled:
            run.sides.append(watch.side(spans.RECALL, {}))  # says nothing of what an encode takes
        else:
            run.ended(note)
        return run.note(0, last=True, resolved=resolved)

    def _make_files(self, run: Run, operation: Operation, notes: NotesInOrder) -> RunNote | None:
        """Each job is told of as soon as its file is made: others may take long, or fail."""
        jobs = self._gathering.jobs(run, operation, notes, told_later=False)
        told, ends = False, False
        for member in tuple(run.members):
            if not self._stays(run, member):
                run.leave(member)
                continue
            began, job = Stopwatch(), jobs[member.request_id]
            try:
                frames = self._frames[operation.name](job)
            except Exception as error:
                self._failures.give_up(run, member, error, notes)
                continue
            told, ends = True, member is run.members[-1]
            done = began.step(0)
            note = run.note_of(member, last=ends)
            place, work = notes.place(), _Encoding(run, job, frames, done, note)
            self._encoding.submit(
                frames.nbytes, partial(self._encode, work, partial(notes.fill, place))
            )
        if not told:
            raise Truncated
        return None if ends else run.over()

    def _encode(self, work: _Encoding, fill: Callable[[list[RunNote]], None]) -> None:
        """In a thread of its own: a job's frames become its file."""
        with telemetry.within(work.job.member.traceparent):
            try:
                note = work.made()
            except Exception as error:
                run, member = work.run, work.job.member
                log.exception("%s in assignment %d", member.request_id, run.assignment.sequence)
                fill(self._not_made(run, member, error, last=work.note.last))
            else:
                fill([note])

    def _not_made(
        self, run: Run, member: mesh_pb2.BatchMember, error: Exception, *, last: bool
    ) -> list[RunNote]:
        """It ends this job, and the others not."""
        if run.alone():
            return [self._failures.of_job(run, member, error, last=True)]
        failed = self._failures.of_job(run, member, error)
        return [failed, RunNote(run.assignment, {}, last=True)] if last else [failed]

    def _stays(self, run: Run, member: mesh_pb2.BatchMember) -> bool:
        return member.request_id in self._inbox.staying(run.assignment)

    def _decode(self, job: JobCall) -> Pixels:
        return self._decodes.frames(job.model, job.member, job.input("latents"))

    def _decoded(self, job: JobCall) -> LatentState:
        return pixels_artifact(self._decode(job))


class _Encoding:
    """A file that is to be made."""

    def __init__(
        self, run: Run, job: JobCall, frames: Pixels, made: StepNote, note: RunNote
    ) -> None:
        """`made`: what the frames took; `note`: what is told, but for the file."""
        self.run, self.job, self.note = run, job, note
        self._frames, self._made = frames, made

    def made(self) -> RunNote:
        """What is told of it. The time is that of frames and file, without waits between them."""
        spec, began = self.job.spec, Stopwatch()
        fps = self.job.shape.fps or spec.shape.fps or self.job.fps
        if len(self._frames) > 1 and not fps:
            raise OperationRefused("fps", fps, "1 or more, for several frames")
        file = Media(*media.encode_media(self._frames, spec.media_type, fps))
        took_us = self._made.duration_us + began.elapsed_ns() // 1000
        step = began.ended(0, took_us)
        request = self.job.member.request_id
        return replace(self.note, steps=(step,), media={request: file})


class _Texts(NamedTuple):
    """Counts of a worker's cache of prompts."""

    recalled: int
    encoded: int


def _texts_of(jobs: Mapping[str, JobCall]) -> _Texts:
    cards = (job.card for job in jobs.values() if job.card is not None)
    known = next((card.prompts for card in cards if card.prompts is not None), None)
    return _Texts(known.recalled, known.encoded) if known is not None else _Texts(0, 0)


def _pixels(job: JobCall) -> Pixels:
    return pixels_of(job.input("image"))
