"""The emulated executor: keeps the torch executor's manners and sleeps by a profile instead of
computing.

For tests and load runs of the control plane with up to thousands of workers; never a stand-in for a
test of a worker. All emulated workers of one process share an `EmulatedHost`, which plays the part
of groups and artifacts: an assignment starts when all its members have come to it and of each thing
that it starts from a holder that it names has a copy with exactly the steps that it names.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import NoReturn

from PIL import Image

from gpuworker.emulation.host import EmulatedHost, Key, Meeting
from gpuworker.executor import (
    CLOSE_PATIENCE_S,
    Listener,
    Media,
    Room,
    RunNote,
    StepNote,
    always_room,
)
from gpuworker.operations.names import ROLES, WEIGHTLESS, artifact_of, operation_of
from gpuworker.steps.inbox import Inbox, StopMark
from hocket.cancelling import one_done
from hocket.v1 import mesh_pb2, types_pb2

__all__ = ["EmulatedExecutor", "EmulatedHost"]


class EmulatedExecutor:
    """One emulated worker."""

    def __init__(
        self,
        worker: str,
        host: EmulatedHost,
        gpu: str,
        *,
        media: bool = True,
        batch_max: int = 1,
        groups_max: int = 64,
        roles: Collection[str] = ROLES,
    ) -> None:
        self._worker = worker
        self._host = host
        self._media = media
        self._inbox = Inbox()
        self._arrived = asyncio.Event()
        self._at: mesh_pb2.Assignment | None = None  # in hand
        self._task: asyncio.Task[None] | None = None
        self._room: Room = always_room
        self._groups: dict[tuple[str, ...], int] = {}  # members -> epoch, the last used last
        self._groups_max = groups_max
        self.models = host.models(batch_max, roles)
        self.operations = WEIGHTLESS
        self.store_address = f"emulated/{worker}"
        self._gpu = gpu

    @property
    def device(self) -> mesh_pb2.Device:
        name = f"emulated {self._gpu}"
        return mesh_pb2.Device(kind="emulated", profile_name=self._gpu, name=name)

    @property
    def memory(self) -> types_pb2.Memory:
        return types_pb2.Memory()

    def start(self, listener: Listener, room: Room = always_room) -> None:
        self._room = room
        self._task = asyncio.get_running_loop().create_task(self._run(listener))

    async def failed(self) -> NoReturn:
        assert self._task is not None, "it was started"
        await asyncio.shield(self._task)
        raise AssertionError("an executor ends by an exception")

    def accept_term(self, term: int) -> bool:
        accepted = self._inbox.accept_term(term)
        self._look_again()
        return accepted

    def plan_loads(self, loads: Sequence[mesh_pb2.WeightsLoad]) -> None:
        """All weights are always there."""

    def submit(self, assignment: mesh_pb2.Assignment) -> None:
        self._inbox.put(assignment)
        self._arrived.set()

    def truncate(self, truncate: mesh_pb2.Truncate) -> None:
        mark = StopMark(truncate.attempt, truncate.stop_at_step)
        self._inbox.truncate(truncate.request_id, mark)
        if truncate.release:
            self.release(truncate.request_id)
        self._look_again()

    def release(self, request: str) -> None:
        for key in [key for key in self._copies if key[0] == request]:
            del self._copies[key]

    def groups(self) -> tuple[types_pb2.Group, ...]:
        return tuple(
            types_pb2.Group(epoch=epoch, members=members) for members, epoch in self._groups.items()
        )

    def fetch(self, wanted: mesh_pb2.LatentFetch) -> None:
        """Here a copy is there at once, or there is none."""
        key, steps = (wanted.request_id, wanted.artifact), wanted.steps_done
        held = self._host.copies.get(wanted.holder.worker, {}).get(key)
        if held == steps and self._copies.get(key, -1) < steps:
            self._copies[key] = steps
            self._host.tell(wanted.request_id)

    def is_idle(self) -> bool:
        return not (self._copies or self._inbox.pending())

    async def tidy(self) -> None:
        """Nothing is lent."""

    def held(self) -> tuple[mesh_pb2.HeldLatent, ...]:
        return tuple(
            mesh_pb2.HeldLatent(request_id=request, steps_done=steps, artifact=artifact)
            for (request, artifact), steps in self._copies.items()
        )

    def progress(self) -> tuple[int, int]:
        return self._inbox.term, self._inbox.sequence

    def pending(self) -> tuple[int, ...]:
        return self._inbox.pending()

    async def offer_latent(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        return mesh_pb2.LatentReply(
            failure=types_pb2.Failure(reason="EMULATED", message="emulated workers hold no latents")
        )

    async def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._host.close(self._worker)

    @property
    def _copies(self) -> dict[Key, int]:
        return self._host.copies.setdefault(self._worker, {})

    def _look_again(self) -> None:
        """Lets the assignment in hand see that it may have to stop."""
        if self._at is not None:
            self._host.tell_all(self._at)

    async def _run(self, listener: Listener) -> None:
        while True:
            assignment = self._inbox.take_ready()
            if assignment is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._at = assignment
            meeting = self._host.enter(assignment, self._worker)
            self._join(assignment.group)
            try:
                if assignment.group.members[0] == self._worker:
                    await self._lead(assignment, meeting, listener)
                else:
                    await self._follow(assignment, meeting)
            finally:
                self._host.leave(assignment, self._worker)
            self._at = None
            self._inbox.done(assignment)

    def _join(self, group: types_pb2.Group) -> None:
        """Groups stand here as they do on a torch worker: as many as there is room for."""
        if len(group.members) > 1:
            self._groups.pop(members := tuple(group.members), None)
            self._groups[members] = group.epoch
            if len(self._groups) > self._groups_max:
                del self._groups[next(iter(self._groups))]

    async def _lead(
        self, assignment: mesh_pb2.Assignment, meeting: Meeting, listener: Listener
    ) -> None:
        host, members, operation = self._host, assignment.batch, operation_of(assignment)

        def staying() -> list[mesh_pb2.BatchMember]:
            stay = self._inbox.staying(assignment)
            return [m for m in members if m.request_id in stay]

        def ready() -> bool:
            stay = staying()
            here = meeting.came == meeting.members
            return not stay or (here and not any(host.missing(assignment, m) for m in stay))

        def decided() -> bool:
            return ready() or any(host.have_passed(assignment, m) for m in staying())

        if not (await self._in_time(assignment, decided) and ready()):
            listener(self._in_vain(assignment, meeting))
            return
        meeting.started = True
        host.gather(assignment)
        step_us, began_us = host.step_time_us(assignment), host.clock.now_us()
        made, going = 0, [m.request_id for m in members]
        while made < assignment.steps and (stay := self._inbox.staying(assignment, made)):
            going = [request for request in going if request in stay]
            await self._room()
            await host.clock.sleep_until(began_us + (made + 1) * step_us)
            made += 1
            self._keep(assignment, made, going)
            ended = not operation.stepped or made == assignment.steps
            behind = _behind(assignment, made, going)
            listener(self._note(assignment, behind, made - 1, step_us, last=ended))
        if made == 0 or (made < assignment.steps and operation.stepped):
            behind = _behind(assignment, made, going)
            listener(RunNote(assignment=assignment, behind=behind, last=True))

    async def _in_time(self, assignment: mesh_pb2.Assignment, ready: Callable[[], bool]) -> bool:
        """Whether an assignment could start within its collectives' time-out."""
        if ready():
            return True
        clock, timeout_us = self._host.clock, assignment.collective_timeout_us
        if not timeout_us:
            await self._host.until(assignment, ready)
            return True
        waits: list[asyncio.Future[None]] = [
            asyncio.ensure_future(self._host.until(assignment, ready)),
            asyncio.ensure_future(clock.sleep_until(clock.now_us() + timeout_us)),
        ]
        try:
            await one_done(*waits)
        finally:
            for wait in waits:
                wait.cancel()
        return ready()

    def _in_vain(self, assignment: mesh_pb2.Assignment, meeting: Meeting) -> RunNote:
        """What a torch worker says whose peers or whose latent do not come."""
        missing = tuple(sorted(meeting.members - meeting.came))
        failure = types_pb2.Failure(reason="GROUP_LOST", message="waited in vain")
        failed_job = mesh_pb2.FailedJob(batch=len(assignment.batch), suspects=missing)
        if not missing:
            stay = self._inbox.staying(assignment)
            lacking = [m for m in assignment.batch if m.request_id in stay]
            found = ((m, self._host.missing(assignment, m)) for m in lacking)
            member, wanted = next(
                ((m, w) for m, w in found if w is not None), (assignment.batch[0], None)
            )
            failure.reason = "LATENT_MISSING"
            failed_job.request_id = member.request_id
            if wanted is not None:
                failed_job.artifact = wanted.artifact
            holders = member.holders if wanted is None else wanted.holders
            failed_job.tried.extend(holder.worker for holder in holders)
        return RunNote(
            assignment=assignment,
            behind={
                m.request_id: self._copies[m.request_id, artifact_of(m)]
                for m in assignment.batch
                if (m.request_id, artifact_of(m)) in self._copies
            },
            last=True,
            failure=failure,
            failed_job=failed_job,
        )

    async def _follow(self, assignment: mesh_pb2.Assignment, meeting: Meeting) -> None:
        """Stays until the first member is through; leaves alone only what has not started."""

        def through() -> bool:
            off = self._inbox.must_stop(assignment)
            return meeting.over or (off and not meeting.started)

        await self._host.until(assignment, through)

    def _keep(self, assignment: mesh_pb2.Assignment, made: int, going: Sequence[str]) -> None:
        """Every member now has a copy of what the step has made."""
        operation = operation_of(assignment)
        if operation.file:
            return
        artifacts = {m.request_id: artifact_of(m) for m in assignment.batch}
        for request, steps in _behind(assignment, made, going).items():
            # What a once-call of a workflow makes has no steps behind it, however many its job has.
            version = steps if operation.stepped or not artifacts[request] else 0
            self._host.keep(assignment, request, artifacts[request], version)

    def _note(
        self,
        assignment: mesh_pb2.Assignment,
        behind: Mapping[str, int],
        step: int,
        step_us: int,
        *,
        last: bool,
    ) -> RunNote:
        now_ns = self._host.clock.now_us() * 1000
        media = {}
        if operation_of(assignment).file and self._media:
            info = types_pb2.MediaInfo(media_type="image/png", width=8, height=8, frames=1)
            media = {request: Media(_blank_png(), info) for request in behind}
        size = len(assignment.group.members)
        members_us = (step_us,) * size if size > 1 else ()  # nobody is slower than the others here
        note = StepNote(step, now_ns - step_us * 1000, now_ns, step_us, step_us, members_us)
        return RunNote(
            assignment=assignment,
            behind=behind,
            steps=(note,),
            last=last,
            media=media,
        )


def _behind(assignment: mesh_pb2.Assignment, made: int, requests: Sequence[str]) -> dict[str, int]:
    """Steps behind these jobs after `made` of the assignment's."""
    stepped = made if operation_of(assignment).stepped else 0
    return {
        m.request_id: m.first_step + stepped for m in assignment.batch if m.request_id in requests
    }


@cache
def _blank_png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()
