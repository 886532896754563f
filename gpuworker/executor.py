"""What runs assignments, seen from the agent: one protocol, two implementations (torch, emulated).

An executor takes assignments in order and tells, through one callback, what became of them. It
never talks to the broker; the agent never runs a step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol

from hocket.clock import steady_ns, unix_ns
from hocket.v1 import generation_pb2, mesh_pb2, types_pb2

CLOSE_PATIENCE_S = 10.0
FAILURE_CHARS_MAX = 4_096  # a compiler's error is as long as its program; control refuses such


_CUT = " ... "


@dataclass(frozen=True)
class StepNote:
    """One step that ended on every member. Wall-clock stamps are for the trace, the duration is
    measured.
    """

    step: int  # of the assignment, 0-based
    start_unix_ns: int
    end_unix_ns: int
    duration_us: int
    own_us: int | None = None  # without what this member spent in exchanges; None: not known
    members_us: tuple[int, ...] = ()  # the same of all members, in their order; empty: not known


@dataclass(frozen=True)
class SideNote:
    """Something an assignment spent time on before its first step, or after its last one."""

    name: str  # "group", "transfer" …
    start_unix_ns: int
    end_unix_ns: int
    attributes: Mapping[str, str | int] = field(default_factory=dict)


class Stopwatch:
    """Takes a duration on the steady clock and remembers the wall-clock start for the trace."""

    def __init__(self) -> None:
        self._start_unix_ns = unix_ns()
        self._start_ns = steady_ns()

    def elapsed_ns(self) -> int:
        return steady_ns() - self._start_ns

    def step(self, step: int) -> StepNote:
        took_ns = self.elapsed_ns()
        start_ns = self._start_unix_ns
        return StepNote(step, start_ns, start_ns + took_ns, took_ns // 1000)

    def ended(self, step: int, took_us: int) -> StepNote:
        """A step that another clock timed, which ended by now."""
        end_ns = self._start_unix_ns + self.elapsed_ns()
        return StepNote(step, end_ns - 1000 * took_us, end_ns, took_us)

    def side(self, name: str, attributes: Mapping[str, str | int]) -> SideNote:
        start_ns = self._start_unix_ns
        return SideNote(name, start_ns, start_ns + self.elapsed_ns(), attributes)


class Media(NamedTuple):
    """A finished file, and what is known of it."""

    content: bytes
    info: types_pb2.MediaInfo


@dataclass(frozen=True)
class RunNote:
    """News of an assignment: becomes one StepReport and the spans of its steps."""

    assignment: mesh_pb2.Assignment
    behind: Mapping[str, int]  # request -> steps behind its latent here; none held: not in it
    steps: tuple[StepNote, ...] = ()
    sides: tuple[SideNote, ...] = ()
    last: bool = False
    failure: types_pb2.Failure | None = None
    failed_job: mesh_pb2.FailedJob | None = None  # whose fault it was, where something is known
    media: Mapping[str, Media] = field(default_factory=dict)  # by request
    resolved: Mapping[str, str] = field(default_factory=dict)  # prompts that are not as asked for

    @property
    def steps_done(self) -> int | None:
        """Of the first job."""
        return self.behind.get(self.assignment.batch[0].request_id)


def failure_of(
    reason: str, message: str, metadata: Mapping[str, str] | None = None
) -> types_pb2.Failure:
    """A failure as it is told; of a long message its beginning and its end."""
    if len(message) > FAILURE_CHARS_MAX:
        half = FAILURE_CHARS_MAX // 2 - len(_CUT)
        message = f"{message[:half]}{_CUT}{message[-half:]}"
    return types_pb2.Failure(reason=reason, message=message, metadata=metadata)


Listener = Callable[[RunNote], None]
Room = Callable[[], Awaitable[None]]  # returns when the listener has room for a note


async def always_room() -> None:
    """Of a listener that takes everything."""


class Executor(Protocol):
    """Runs assignments in the order of their sequence numbers."""

    @property
    def device(self) -> mesh_pb2.Device:
        """The accelerator and its memory, as of now."""

    @property
    def memory(self) -> types_pb2.Memory:
        """What its memory is used for, as of now."""

    models: tuple[generation_pb2.ModelInfo, ...]
    operations: tuple[str, ...]  # of workflows, without any model's weights
    store_address: str

    def start(self, listener: Listener, room: Room = always_room) -> None:
        """Begins to take assignments. `listener` is called from any thread; outside of the loop's
        own it may block, in which `room` is waited for instead.
        """

    async def failed(self) -> NoReturn:
        """Waits for ever, or raises what has ended the executor: the process must end with it."""

    def accept_term(self, term: int) -> bool:
        """False for a message of an older term than one already seen."""

    def plan_loads(self, loads: Sequence[mesh_pb2.WeightsLoad]) -> None:
        """What the plan loads and evicts for assignments that are submitted next."""

    def submit(self, assignment: mesh_pb2.Assignment) -> None:
        """Queues an assignment; a repeated one is ignored."""

    def truncate(self, truncate: mesh_pb2.Truncate) -> None:
        """Stops or skips a request's assignments; drops its latents if it has ended."""

    def release(self, request: str) -> None:
        """Drops the artifacts of a request that has ended."""

    def held(self) -> tuple[mesh_pb2.HeldLatent, ...]:
        """Artifacts in this worker's memory."""

    def groups(self) -> tuple[types_pb2.Group, ...]:
        """Groups of more than one member that stand here."""

    def fetch(self, wanted: mesh_pb2.LatentFetch) -> None:
        """Copies a latent to this worker, beside its steps; a repeated wish is ignored."""

    def is_idle(self) -> bool:
        """Whether there is nothing in hand, nothing held, and nothing that others fetch."""

    async def tidy(self) -> None:
        """Frees what others have fetched; to be called with each heartbeat."""

    def progress(self) -> tuple[int, int]:
        """(term, highest assignment sequence received), for the heartbeat."""

    def pending(self) -> tuple[int, ...]:
        """Assignments of the term that were received and are not over, by sequence number."""

    async def offer_latent(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        """Makes a latent ready to be fetched, waiting for its step to end if need be."""

    async def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """Stops after the step in hand, for which it waits so long, and frees everything."""
