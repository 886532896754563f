"""Faults done to the processes of a mesh that this process started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.chaos.faults import (
    BROKER,
    GATEWAY,
    KILL,
    LEADER,
    SHAKE,
    STANDBY,
    STOP,
    TERM,
    WORKER,
    ChaosFault,
)
from hocket.launching import endpoints
from hocket.launching.launcher import RunningMesh
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.v1.control_pb2 import WatchClusterRequest, WatchClusterResponse
from hocket.v1.control_pb2_grpc import ControlServiceStub

_ANSWER_S = 1.0
_SHAKE_STOP_S, _SHAKE_GO_S = 0.2, 0.1


@dataclass(frozen=True)
class Victim:
    """A process that a fault is done to."""

    name: str
    pid: int


@dataclass
class Strikes:
    """Finds victims and does what a fault says. Stopped processes always go on in the end."""

    mesh: RunningMesh
    state_dir: Path
    workers: int  # torch workers, each a process; 0: all emulated ones in one
    pids: set[int] = field(default_factory=set)  # every process that was ever seen
    _stopped: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    async def victim(self, fault: ChaosFault) -> Victim | None:
        """Whom the fault meets now; None when no such process is there."""
        if fault.target == WORKER and fault.act == TERM:
            found = self._children("workers")  # who is told to leave is not started again alone
        else:
            found = await self._candidates(fault.target)
        return found[int(fault.pick * len(found))] if found else None

    def strike(self, fault: ChaosFault, victim: Victim) -> None:
        """Does it; a process that is stopped goes on after the fault's span, by itself."""
        if fault.act == KILL:
            _send(victim.pid, signal.SIGKILL)
        elif fault.act == TERM:
            _send(victim.pid, signal.SIGTERM)
        elif fault.act in (STOP, SHAKE):
            pulses = fault.act == SHAKE
            task = asyncio.get_running_loop().create_task(_hold(victim.pid, fault.span_s, pulses))
            self._stopped[victim.pid] = task

    async def calm(self) -> None:
        """Lets every stopped process go on, and waits until that is done."""
        for task in self._stopped.values():
            task.cancel()
        await asyncio.gather(*self._stopped.values(), return_exceptions=True)

    def look(self) -> None:
        """Takes down which processes there are."""
        self.pids |= {child.process.pid for child in self.mesh.children.all}
        self.pids |= {one.pid for one in self.worker_processes()}

    def worker_processes(self) -> list[Victim]:
        """The torch workers that are alive."""
        named = [(f"w{n}", endpoints.find(self.state_dir, f"w{n}")) for n in range(self.workers)]
        return [Victim(name, found.pid) for name, found in named if found is not None]

    async def _candidates(self, target: str) -> list[Victim]:
        if target == GATEWAY:
            return self._children("gateway")
        if target == BROKER:
            return self._children("nats")
        if target in (LEADER, STANDBY):
            return await self._controls(leads=target == LEADER)
        return self.worker_processes() or self._children("workers")

    def _children(self, service: str) -> list[Victim]:
        return [
            Victim(child.name, child.process.pid)
            for child in self.mesh.children.all
            if child.name.split("-")[0] == service and child.up.is_set()
        ]

    async def _controls(self, *, leads: bool) -> list[Victim]:
        controls = self._children("control")
        leader = await self._leader_pid()
        if leads:
            known = [one for one in controls if one.pid == leader]
            return known or (controls if len(controls) == 1 else [])
        return [one for one in controls if one.pid != leader] if leader else []

    async def _leader_pid(self) -> int:
        for door in endpoints.living(self.state_dir, "control"):
            if await cluster_state(door.address) is not None:
                return door.pid
        return 0


async def cluster_state(address: str) -> WatchClusterResponse | None:
    """What a leader says of its cluster; None where none answers at that door."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stream = ControlServiceStub(channel).WatchCluster(WatchClusterRequest(), timeout=_ANSWER_S)
        try:
            first = await stream.read()
        except grpc.aio.AioRpcError:
            return None
        finally:
            stream.cancel()
    return first if isinstance(first, WatchClusterResponse) else None


async def _hold(pid: int, span_s: float, pulses: bool) -> None:
    loop = asyncio.get_running_loop()
    until_s = loop.time() + span_s
    try:
        while (left_s := until_s - loop.time()) > 0:
            _send(pid, signal.SIGSTOP)
            await asyncio.sleep(min(left_s, _SHAKE_STOP_S) if pulses else left_s)
            if pulses:
                _send(pid, signal.SIGCONT)
                await asyncio.sleep(_SHAKE_GO_S)
    finally:
        _send(pid, signal.SIGCONT)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


async def eventually(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether a condition came to hold within the limit; looked at ten times a second."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limit_s
    while not condition() and loop.time() < end_s:  # noqa: ASYNC110  processes send no event
        await asyncio.sleep(0.1)
    return condition()
