"""What the emulated workers of one process share: it plays the part of groups and artifacts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from gpuworker.emulation.profile import Cell
from gpuworker.operations.names import (
    CALLS,
    ROLES,
    CallInput,
    model_of,
    offered,
    operation_of,
    shape_of,
    wanted_by,
)
from hocket.clock import Clock
from hocket.v1 import generation_pb2, mesh_pb2, types_pb2

Key = tuple[str, str]  # request, artifact; the latents of a plain chain have an empty name
WEIGHTLESS_US = 1000  # of a call without weights of which the profile says nothing
# Of a model's; see the cards'.
_OPERATIONS = (*(name for name, each in CALLS.items() if each.part), "denoise.mask")


@dataclass
class Meeting:
    """An assignment whose members are at it; it is dropped once all of them have left."""

    members: frozenset[str]
    came: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    started: bool = False
    over: bool = False  # the first member has left


@dataclass
class EmulatedHost:
    """What the emulated workers of one process share."""

    clock: Clock
    profile: dict[Cell, int]
    copies: dict[str, dict[Key, int]] = field(default_factory=dict)  # worker -> what -> steps
    meetings: dict[tuple[int, int], Meeting] = field(default_factory=dict)  # by term, sequence
    gone: set[str] = field(default_factory=set)  # workers that were closed
    term: int = 0  # the newest one met with
    waiting: dict[str, list[asyncio.Future[None]]] = field(default_factory=dict)  # by request

    async def until(self, assignment: mesh_pb2.Assignment, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds; looked at whenever `tell` names one of the jobs."""
        while not condition():
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            for member in assignment.batch:
                self.waiting.setdefault(member.request_id, []).append(waiter)
            await waiter

    def have_passed(self, assignment: mesh_pb2.Assignment, member: mesh_pb2.BatchMember) -> bool:
        """Whether every named holder is beyond the named steps of something: it is no more."""
        return any(
            wanted.holders and all(have > named for have, named in self._copies(member, wanted))
            for wanted in wanted_by(operation_of(assignment), member)
        )

    def tell(self, request: str) -> None:
        """Something has changed about a request."""
        for waiter in self.waiting.pop(request, ()):
            if not waiter.done():
                waiter.set_result(None)

    def tell_all(self, assignment: mesh_pb2.Assignment) -> None:
        """Something has changed about its jobs."""
        for member in assignment.batch:
            self.tell(member.request_id)

    def enter(self, assignment: mesh_pb2.Assignment, worker: str) -> Meeting:
        """A worker comes to an assignment, as the next of its members or as the first one."""
        self.gone.discard(worker)
        if assignment.term > self.term:
            self.term = assignment.term
            self._drop_left()
        fresh = Meeting(frozenset(assignment.group.members))
        meeting = self.meetings.setdefault((assignment.term, assignment.sequence), fresh)
        meeting.came.add(worker)
        self.tell_all(assignment)
        return meeting

    def leave(self, assignment: mesh_pb2.Assignment, worker: str) -> None:
        """A worker is through with an assignment, or gives it up."""
        key = (assignment.term, assignment.sequence)
        meeting = self.meetings[key]
        meeting.left.add(worker)
        meeting.over = meeting.over or worker == assignment.group.members[0]
        if self._all_left(key):
            del self.meetings[key]
        self.tell_all(assignment)

    def close(self, worker: str) -> None:
        """A worker is no more."""
        self.gone.add(worker)
        self.copies.pop(worker, None)
        self._drop_left()

    def missing(
        self, assignment: mesh_pb2.Assignment, member: mesh_pb2.BatchMember
    ) -> CallInput | None:
        """The first thing that a job starts from of which no named holder has exactly the named
        version.
        """
        for wanted in wanted_by(operation_of(assignment), member):
            if not any(have == named for have, named in self._copies(member, wanted)):
                return wanted
        return None

    def gather(self, assignment: mesh_pb2.Assignment) -> None:
        """Every member gets what a workflow's jobs start from."""
        for member in assignment.batch if assignment.batch[0].HasField("call") else ():
            for wanted in wanted_by(operation_of(assignment), member):
                self.keep(assignment, member.request_id, wanted.artifact, wanted.version)

    def keep(
        self, assignment: mesh_pb2.Assignment, request: str, artifact: str, steps: int
    ) -> None:
        """Every member has a copy; those of closed workers are gone."""
        for worker in assignment.group.members:
            if worker not in self.gone:
                self.copies.setdefault(worker, {})[request, artifact] = steps
        self.tell(request)

    def _copies(self, member: mesh_pb2.BatchMember, wanted: CallInput) -> list[tuple[int, int]]:
        """Of each named holder: the version that it has (-1: none), and the one that is named."""
        key = (member.request_id, wanted.artifact)
        return [
            (self.copies.get(holder.worker, {}).get(key, -1), holder.steps_done)
            for holder in wanted.holders
        ]

    def _all_left(self, key: tuple[int, int]) -> bool:
        """Nobody is at it and nobody will come: closed workers never do, and those that obey a
        newer term have forgotten it.
        """
        meeting = self.meetings[key]
        absent = meeting.members - meeting.left - self.gone
        return meeting.came <= meeting.left and (not absent or key[0] < self.term)

    def _drop_left(self) -> None:
        for key in [key for key in self.meetings if self._all_left(key)]:
            del self.meetings[key]

    def step_time_us(self, assignment: mesh_pb2.Assignment) -> int:
        if len(assignment.batch) > 1:  # of which the profile here says nothing
            return assignment.predicted_step_time_us
        first, operation = assignment.batch[0], operation_of(assignment)
        named = shape_of(first)
        shape = (named.width, named.height, max(1, named.frames))
        cell = (
            model_of(first),
            operation.part or operation.name,
            *shape,
            len(assignment.group.members),
        )
        known = assignment.predicted_step_time_us if operation.part else WEIGHTLESS_US
        return self.profile.get(cell, known)

    def models(
        self, batch_max: int, roles: Collection[str] = ROLES
    ) -> tuple[generation_pb2.ModelInfo, ...]:
        """The models of the profile, with every profiled shape and degree."""
        infos = []
        for name in sorted({cell[0] for cell in self.profile}):
            dit = [c for c in self.profile if c[0] == name and c[1] == "dit"]
            shapes = sorted({c[2:5] for c in dit})
            video = any(frames > 1 for _, _, frames in shapes)
            infos.append(
                generation_pb2.ModelInfo(
                    name=name,
                    family="emulated",
                    workflows=["txt2vid" if video else "txt2img"],
                    shapes=[types_pb2.Shape(width=w, height=h, frames=f) for w, h, f in shapes],
                    steps_min=1,
                    steps_max=1000,
                    steps_default=28,
                    guidance_kind="embedded",
                    guidance_max=100.0,
                    guidance_default=3.5,
                    degrees=sorted({c[5] for c in dit}),
                    batch_max=batch_max,
                    operations=offered(_OPERATIONS, roles),
                )
            )
        return tuple(infos)
