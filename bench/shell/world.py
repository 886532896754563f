"""A simulated fleet: processes with names that are started, stopped, killed and started again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from gpuworker.emulation.executor import EmulatedExecutor
from gpuworker.executor import RunNote
from hocket.messaging.bus import Subjects
from hocket.messaging.leader import LeaderKey, read_key

from .loop import SimulatedLoop, SimulatedProcess
from .messaging.broker import Broker
from .messaging.client import Client
from .rpc.link import Network
from .toy_model import CLUSTER, emulated_host
from .wire import Weather

SECOND_US = 1_000_000
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_RESTART_US = SECOND_US  # a supervisor starts again what ended so long ago
Role = Callable[["World", SimulatedProcess], Coroutine[Any, Any, None]]  # what a process does


@dataclass
class FleetMember:
    """A process of the fleet over all its lives."""

    name: str
    role: Role
    process: SimulatedProcess | None = None
    task: asyncio.Task[None] | None = None
    wanted: bool = True  # its supervisor starts it again
    starts: int = 0


@dataclass(frozen=True)
class Death:
    """A process that ended without having been told to."""

    at_us: int
    name: str
    error: BaseException | None


@dataclass
class WorkLog:
    """What workers did, as their executors say; reports of it may come much later."""

    at_us: dict[str, int] = field(default_factory=dict)  # last, by request
    # Processes that worked under a name, in turns, by name and term.
    turns: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    def note(self, worker: str, process: str, note: RunNote, now_us: int) -> None:
        if not note.steps:
            return
        turns = self.turns.setdefault((worker, note.assignment.term), [])
        if turns[-1:] != [process]:
            turns.append(process)
        for member in note.assignment.batch:
            self.at_us[member.request_id] = now_us


@dataclass
class Tally:
    """What strangers have said (see strangers.py), and what became of it."""

    heard: int = 0  # payloads for control that reached somebody
    taken: str = ""  # a call that was not refused as it should be

    def note_status(self, what: str, code: grpc.StatusCode | None) -> None:
        """`code`: how a call ended; None: it was answered."""
        if code is not grpc.StatusCode.INVALID_ARGUMENT and code not in _AWAY:
            self.taken = f"{what}: {'taken' if code is None else code.name}"


@dataclass
class World:
    """All of it. Make it inside the loop that it runs on."""

    seed: int
    loop: SimulatedLoop
    state_dir: Path
    policy: str = "edf"
    open_max: int = 10_000  # requests that control takes at a time
    rng: random.Random = field(init=False)
    weather: Weather = field(default_factory=Weather)
    clients: list[Client] = field(default_factory=list)
    executors: dict[str, EmulatedExecutor] = field(default_factory=dict)
    members: dict[str, FleetMember] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    undrained_us: dict[str, int] = field(default_factory=dict)  # when last, by worker
    drained: list[tuple[str, int, int]] = field(default_factory=list)  # worker, from, until
    answered: asyncio.Event = field(default_factory=asyncio.Event)  # every caller is through
    over: bool = False  # it is being shut down: what happens now is nobody's concern
    immortal: int = 0  # tasks of killed processes that refused to end
    work: WorkLog = field(default_factory=WorkLog)
    tally: Tally = field(default_factory=Tally)  # of strangers
    past: list[SimulatedProcess] = field(default_factory=list)  # processes that are over

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        net = random.Random(self.seed + 1)
        self.broker = Broker(self.loop, net, self.weather)
        self.network = Network(self.loop, net, self.weather)
        self.loop.thread_us = lambda: net.randrange(2_000)
        self.emulated = emulated_host(self.loop)

    @property
    def now_us(self) -> int:
        return self.loop.now_us

    def add(self, name: str, role: Role, *, wanted: bool = True) -> FleetMember:
        """`wanted`: it is started again whenever it ends."""
        member = self.members[name] = FleetMember(name, role, wanted=wanted)
        self.start(name)
        return member

    def start(self, name: str) -> None:
        """Starts a process, unless it runs."""
        member = self.members[name]
        if member.process is not None:
            return
        member.starts += 1
        process = member.process = self.loop.process(name)
        member.task = process.start(member.role(self, process), name)
        member.task.add_done_callback(lambda task: self._ended(member, process, task))

    async def kill(self, name: str) -> None:
        """kill -9; `start` gives it a new life."""
        process = self.members[name].process
        if process is not None:
            self.immortal += await process.kill()

    def terminate(self, name: str) -> None:
        """SIGTERM."""
        process = self.members[name].process
        if process is not None:
            process.call(process.on_terminate)

    def stop(self, name: str) -> None:
        """SIGSTOP."""
        process = self.members[name].process
        if process is not None:
            process.stop()

    def go_on(self, name: str) -> None:
        """SIGCONT."""
        process = self.members[name].process
        if process is not None:
            process.resume()

    def clients_of(self, name: str) -> list[Client]:
        """Its living connections to the broker."""
        process = self.members[name].process
        return [c for c in self.clients if c.process is process and not c.is_closed]

    def leader_address(self) -> str:
        """Where the leader serves, as far as it has said so; "" when it has not."""
        key = self._leader_key()
        return key.address if key is not None else ""

    def is_led(self) -> bool:
        """Whether the process that the leader's key names lives and has taken up its term."""
        key = self._leader_key()
        door = self.network.doors.get(key.address) if key is not None and key.term else None
        return door is not None and not door.process.dead and not door.process.stopped

    def _leader_key(self) -> LeaderKey | None:
        found = self.broker.all_of(f"KV_{Subjects(CLUSTER).leader_bucket}")
        return read_key(found[-1].data) if found else None

    async def until(self, condition: Callable[[], bool], at_most_us: int) -> bool:
        """Waits for something, looked at four times a second; whether it came."""
        end_us = self.now_us + at_most_us
        while not condition() and self.now_us < end_us:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.25)
        return condition()

    async def shut_down(self) -> None:
        """Kills whatever still runs."""
        self.over = True
        for member in self.members.values():
            member.wanted = False
        for name in self.members:
            await self.kill(name)

    def _ended(
        self, member: FleetMember, process: SimulatedProcess, task: asyncio.Task[None]
    ) -> None:
        error = None if task.cancelled() else task.exception()
        if not process.dead and (member.wanted or error is not None):
            self.deaths.append(Death(self.now_us, member.name, error))
        if member.process is process:
            member.process = None
        self.past.append(process)
        self.loop.at_us(self.now_us + _RESTART_US, self._restart, member, process)

    def _restart(self, member: FleetMember, process: SimulatedProcess) -> None:
        self._bury(process)
        if member.wanted:
            self.start(member.name)

    def _bury(self, process: SimulatedProcess) -> None:
        """What a process left running ends with it."""
        self.outside(process.kill())

    def outside(self, work: Coroutine[Any, Any, object]) -> None:
        """Does something outside of every process."""
        task = self.loop.create_task(work, context=Context())
        self._outside.add(task)
        task.add_done_callback(self._outside.discard)

    _outside: set[asyncio.Task[object]] = field(default_factory=set)
