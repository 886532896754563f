"""An emulated worker with its agent on a real bus, and a leader's words to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.trace import NoOpTracer

from gpuworker.agent import Agent
from gpuworker.config import WorkerSettings
from gpuworker.emulation.executor import EmulatedExecutor, EmulatedHost
from hocket.clock import ManualClock
from hocket.messaging.bus import Bus, Feed, Subjects
from hocket.v1 import mesh_pb2, types_pb2

STEP_US = 1000
WAIT_S = 60.0
NEVER_US = 1 << 40


@dataclass
class Desk:
    """One worker process's worth of things."""

    agent: Agent
    executor: EmulatedExecutor
    bus: Bus
    subjects: Subjects
    clock: ManualClock
    beats: Feed[mesh_pb2.Heartbeat]
    reports: Feed[mesh_pb2.StepReport]
    running: asyncio.Task[None]

    @property
    def name(self) -> str:
        return self.agent.name

    async def assign(self, **fields: object) -> None:
        """Publishes a message of control to this worker's name."""
        message = mesh_pb2.Assign(**{"term": 1, **fields})  # type: ignore[arg-type]
        await self.bus.publish(self.subjects.assign(self.name), message)

    async def report(self) -> mesh_pb2.StepReport:
        """The next report; time goes on whenever somebody waits for it."""
        return await self.playing(self.reports.next())

    async def beat(self) -> mesh_pb2.Heartbeat:
        """The next heartbeat, whenever it is sent."""
        async with asyncio.timeout(WAIT_S):
            return await self.beats.next()

    async def playing(self, awaited: object) -> Any:
        """Lets time run until something has happened."""
        task = asyncio.ensure_future(awaited)  # type: ignore[call-overload]
        async with asyncio.timeout(WAIT_S):
            while not (await asyncio.wait([task], timeout=0.005))[0]:
                wake_us = self.clock.next_wake_us()
                if wake_us is not None and wake_us < NEVER_US // 2:
                    self.clock.advance_to(wake_us)
        return task.result()

    async def settle(self) -> None:
        """Returns when everything published here has been handled here."""
        await self.bus.flush()
        await asyncio.sleep(0)
        await self.bus.flush()


@asynccontextmanager
async def desk(
    url: str,
    folder: Path,
    cluster: str,
    *,
    name: str = "w0",
    clock: ManualClock | None = None,
    host: EmulatedHost | None = None,
    bus: Bus | None = None,
    **settings: object,
) -> AsyncIterator[Desk]:
    """A worker that has sent its first heartbeat."""
    clock = clock or ManualClock()
    cells = {("m", node, 8, 8, 1, 1): STEP_US for node in ("text", "dit", "vae")}
    host = host or EmulatedHost(clock, cells)
    own_bus = bus is None
    bus = bus or await Bus.connect(url, name)
    executor = EmulatedExecutor(name, host, "cpu", batch_max=4)
    told = {"heartbeat_us": NEVER_US, "media_bytes_max": 8 << 20, **settings}
    made = WorkerSettings(cluster=cluster, state_dir=folder, **told)  # type: ignore[arg-type]
    agent = Agent(name, made, bus, executor, clock, NoOpTracer())
    subjects = Subjects(cluster)
    beats = await bus.follow(subjects.heartbeat(name), mesh_pb2.Heartbeat)
    reports = await bus.follow(subjects.report(name), mesh_pb2.StepReport)
    running = asyncio.create_task(agent.run())
    opened = Desk(agent, executor, bus, subjects, clock, beats, reports, running)
    first = await opened.beat()
    while first.incarnation != agent.incarnation:  # another process of this name
        first = await opened.beat()
    try:
        yield opened
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await executor.close()
        if own_bus:
            await bus.close()


def job(
    sequence: int,
    node: str,
    *requests: str,
    steps: int = 1,
    first: int = 0,
    workers: Sequence[str] = ("w0",),
    term: int = 1,
) -> mesh_pb2.Assignment:
    """Steps of some requests, of which the first worker holds the latents."""
    spec = types_pb2.GenerationSpec(model="m", shape=types_pb2.Shape(width=8, height=8), steps=8)
    holder = types_pb2.LatentHolder(worker=workers[0], steps_done=first)
    batch = [
        mesh_pb2.BatchMember(
            request_id=request, spec=spec, first_step=first, steps_total=8, holders=[holder]
        )
        for request in requests or ("r",)
    ]
    return mesh_pb2.Assignment(
        sequence=sequence,
        node=node,
        term=term,
        steps=steps,
        batch=batch,
        group=types_pb2.Group(epoch=1, members=workers),
    )
