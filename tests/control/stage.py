"""A leader's desk without a broker: promises in memory, workers that a test plays, a manual clock.

Nothing here sleeps. `settle` lets everything happen that belongs to the present instant.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message
from opentelemetry.trace import NoOpTracer

from control.desk import Desk, Wiring
from control.leading.room import no_room
from control.requests.offers import AdmissionSettings
from control.scaling.settings import ScalingSettings
from control.scaling.signal import WakeSettings
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.workers.intake import Intake
from control.workers.leases import Leases
from hocket.clock import ManualClock
from hocket.messaging.bus import Subjects
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, mesh_pb2, types_pb2

TERM = 7
STEP_US = 100_000
PASSES = 60  # of the event loop: enough for whatever one message sets off
M = TypeVar("M", bound=Message)


@dataclass
class Shelf:
    """Promises in memory. While it is closed, appends wait, as with a broker that stands still."""

    term: int = TERM
    stored: list[journal_pb2.Promise] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    wishes: list[tuple[str, bool]] = field(default_factory=list)
    begun: int = 0
    room: int | None = None  # appends until there is none
    told: list[str] = field(default_factory=list)  # what clients heard when it was stored
    is_open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.is_open.set()

    async def append(self, promise: journal_pb2.Promise) -> int:
        self.begun += 1
        await self.is_open.wait()
        if self.room == len(self.stored):
            raise no_room()
        kept = journal_pb2.Promise()
        kept.CopyFrom(promise)
        self.stored.append(kept)
        return 1_000_000 + len(self.stored)

    async def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    async def drain(self, worker: str, draining: bool) -> None:
        self.wishes.append((worker, draining))

    def ids(self, *, ended: bool) -> list[str]:
        return [p.submit.request_id for p in self.stored if p.HasField("ended") == ended]


class Wire:
    """The bus, as far as control uses it: keeps what was published."""

    def __init__(self) -> None:
        self.drops = self.undecodable = self.refused = 0
        self.said: list[tuple[str, Message]] = []

    async def publish(self, subject: str, message: Message) -> None:
        self.said.append((subject, message))

    async def flush(self) -> bool:
        return True

    def of(self, kind: type[M]) -> list[M]:
        return [m for _, m in self.said if isinstance(m, kind)]


class Diary:
    """Notes that nobody reads."""

    term = TERM

    async def note(self, entry: journal_pb2.JournalEntry) -> None:
        """Forgets it."""


class Gateway:
    """The other end of a line."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[control_pb2.AttachRequest | None] = asyncio.Queue()
        self.heard: list[control_pb2.AttachResponse] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.beats = True

    async def receive(self) -> control_pb2.AttachRequest | None:
        return await self.up.get()

    async def send(self, message: control_pb2.AttachResponse) -> None:
        await self.reads.wait()
        self.heard.append(message)

    def say(self, **lists: object) -> None:
        self.up.put_nowait(control_pb2.AttachRequest(gateway="g", **lists))

    def hang_up(self) -> None:
        self.beats = False
        self.up.put_nowait(None)

    @property
    def answers(self) -> dict[int, control_pb2.SubmitResponse]:
        return {a.call: a.answer for m in self.heard for a in m.answers}

    @property
    def followed(self) -> list[control_pb2.Followed]:
        return [f for m in self.heard for f in m.followed]

    def events(self, request: str) -> list[mesh_pb2.RequestEvent]:
        return [e for m in self.heard for e in m.events if e.request_id == request]

    def kinds(self, request: str) -> list[str]:
        return [e.WhichOneof("event") or "" for e in self.events(request)]


class Stage:
    """The desk and its ear, on a manual clock."""

    def __init__(
        self,
        *,
        grace_us: int = 10_000_000,
        wake: WakeSettings | None = None,
        scaling: ScalingSettings | None = None,
        **admission: int,
    ) -> None:
        self.clock = ManualClock(1_000_000)
        self.shelf = Shelf()
        self.wire = Wire()
        settings = Settings(policy="edf", default_step_us=STEP_US)
        self.desk = Desk.build(
            Wiring(
                bus=self.wire,  # type: ignore[arg-type]
                subjects=Subjects("stage"),
                diary=Diary(),
                promises=self.shelf,
                scheduler=Scheduler(settings, Profile({})),
                leases=Leases(2_000_000),
                clock=self.clock,
                tracer=NoOpTracer(),
                policy="edf",
                follower_grace_us=grace_us,
                admission=AdmissionSettings(**admission),
                wake=wake or WakeSettings(),
                scaling=scaling or ScalingSettings(),
            )
        )
        self.intake: Intake = self.desk.intake(lambda _: None)
        self._reported = 0
        self._gateways: list[Gateway] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def settle(self) -> None:
        for _ in range(PASSES):
            await asyncio.sleep(0)
            self.clock.settled()

    async def until(self, condition: Callable[[], object]) -> None:
        """Settles until it holds; fails where nothing more happens."""
        for _ in range(PASSES):
            if condition():
                return
            await self.settle()
        raise AssertionError("it never came to that")

    async def advance(self, by_us: int) -> None:
        """Moves time on, stopping wherever somebody wakes."""
        end_us = self.clock.now_us() + by_us
        await self.settle()
        while (next_us := self.clock.next_wake_us()) is not None and next_us <= end_us:
            self.clock.advance_to(next_us)
            for gateway in self._gateways:
                if gateway.beats:
                    gateway.say()
            await self.settle()
        self.clock.advance_to(end_us)
        await self.settle()

    async def beat(self, worker: str = "w0", **fields: object) -> None:
        model = generation_pb2.ModelInfo(
            name="m", degrees=[1], steps_min=1, steps_max=100, shapes=SHAPES
        )
        fields = {"incarnation": "a", "term": TERM, "models": [model], **fields}
        device = mesh_pb2.Device(profile_name="cpu")
        await self.intake.heartbeat(
            mesh_pb2.Heartbeat(worker=worker, device=device, **fields)  # type: ignore[arg-type]
        )
        await self.settle()

    def own(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end

    def attach(self) -> Gateway:
        gateway = Gateway()
        self._gateways.append(gateway)
        self.own(self.desk.attachments.attach(gateway))
        return gateway

    def assigned(self) -> list[mesh_pb2.Assignment]:
        return [a for m in self.wire.of(mesh_pb2.Assign) for a in m.assignments]

    async def report(self, assignment: mesh_pb2.Assignment, *, media: str = "") -> None:
        """The end of an assignment, as its worker tells it."""
        results = []
        for member in assignment.batch:
            done = member.first_step + (assignment.steps if _steps(assignment) else 0)
            result = mesh_pb2.StepResult(
                request_id=member.request_id, attempt=member.attempt, steps_done=done
            )
            if media and assignment.node == "vae":
                result.media.object_name = media
            results.append(result)
        await self.intake.report(
            mesh_pb2.StepReport(
                worker=assignment.group.members[0],
                incarnation="a",
                term=TERM,
                sequence=assignment.sequence,
                node=assignment.node,
                results=results,
                members=assignment.group.members,
                step_time_us=[STEP_US] * assignment.steps,
                last=True,
            )
        )
        await self.settle()

    def cancel(self, request: str) -> None:
        """As a Cancel does whose answer nobody waits for."""
        asked = control_pb2.CancelRequestRequest(request_id=request)

        async def call() -> None:
            await self.desk.servicer.CancelRequest(asked, None)  # type: ignore[arg-type]

        self.own(call())

    async def work(self, *, media: str = "made") -> None:
        """Workers do what they were told until nothing is left to do."""
        await self.settle()
        while self._reported < len(self.assigned()):
            assignment = self.assigned()[self._reported]
            self._reported += 1
            await self.report(assignment, media=media)
            await self.advance(STEP_US)

    def submit(self, gateway: Gateway, request: str, call: int = 1, **fields: object) -> None:
        """One submit on a line, with the follower `f-<request>` unless another is named."""
        known = {name: fields.pop(name) for name in ("follower", "expires_us") if name in fields}
        asked: dict[str, object] = {"follower": f"f-{request}", **known}
        gateway.say(
            submits=[
                control_pb2.AttachedSubmit(
                    call=call,
                    submit=submit_of(request, **fields),
                    **asked,  # type: ignore[arg-type]
                )
            ]
        )


def _steps(assignment: mesh_pb2.Assignment) -> bool:
    return assignment.node == "dit" or assignment.batch[0].call.op == "denoise"


SHAPES = [
    types_pb2.Shape(width=64, height=64, frames=1),
    types_pb2.Shape(width=32, height=32, frames=1),
]


def submit_of(
    request: str, *, steps: int = 4, wish: bytes = b"", seed: int = 1, **fields: object
) -> control_pb2.SubmitRequest:
    spec = types_pb2.GenerationSpec(
        model="m", prompt="a fox", steps=steps, seed=seed, shape=SHAPES[0]
    )
    asked = generation_pb2.GenerateRequest(spec=spec, **fields)  # type: ignore[arg-type]
    return control_pb2.SubmitRequest(request_id=request, request=asked, wish_sha256=wish)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Stage]:
    """A stage whose parts run, with one worker; a part that fails fails the test."""
    stage = Stage(**settings)
    for part in stage.desk.parts():
        stage.own(part)
    await stage.beat()
    try:
        yield stage
    finally:
        await stage.close()
