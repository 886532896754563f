"""One Case through the *live* driver: real broker, real agents, emulated workers, a manual clock.

The counterpart of `bench.sim.loop.run`: the same Case must give the same plan digests. Time moves
only when nothing is left to happen in an instant: all messages delivered, all handlers done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from opentelemetry.trace import NoOpTracer

from bench.sim.case import Case
from bench.sim.trace import TraceRequest
from control import translate
from control.desk import Desk, Wiring
from control.driver import Driver, Turn
from control.journal import Journal
from control.publisher import Publisher
from control.requests import Records
from control.scheduler import values
from control.scheduler.core import Scheduler
from control.workers.leases import Leases
from gpuworker.agent import Agent
from gpuworker.config import WorkerSettings
from gpuworker.emulation.executor import EmulatedExecutor, EmulatedHost
from gpuworker.emulation.profile import profile_cells
from hocket.clock import ManualClock
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, mesh_pb2, types_pb2

_QUIET_ROUNDS = 2  # flushes without a message before an instant counts as over
_DIARY_BYTES = 64 << 20
_LOOP_PASSES = 20  # of the event loop per flush: callbacks of callbacks


class ManualRun:
    """Wires a Case's live system together; `run` returns the digests of its plans."""

    def __init__(self, case: Case, cluster: str, url: str, state_dir: Path) -> None:
        self._case = case
        self._cluster = cluster
        self._url = url
        self._state_dir = state_dir
        self._clock = ManualClock()
        self._digests: list[str] = []
        self._buses: list[Bus] = []

    async def run(self) -> list[str]:
        """Runs the Case to its end. Raises RuntimeError if a request never ends."""
        case, subjects = self._case, Subjects(self._cluster)
        bus = await self._connect("control")
        journal = await Journal.open(bus, subjects, 1, _DIARY_BYTES)
        desk = Desk.build(
            Wiring(
                bus=bus,
                subjects=subjects,
                diary=journal,
                promises=_Kept(journal.term),
                scheduler=Scheduler(case.settings, case.profile),
                leases=Leases(lease_us=1 << 60),
                clock=self._clock,
                tracer=NoOpTracer(),
                policy=case.settings.policy,
                outlet=lambda publisher: _Digests(publisher, self._digests),
            )
        )
        driver, records = desk.driver, desk.records
        await bus.subscribe(
            subjects.heartbeat("*"), mesh_pb2.Heartbeat, _Heartbeats(desk.wiring.leases, driver)
        )
        await bus.subscribe(subjects.report("*"), mesh_pb2.StepReport, _Reports(driver))
        executors: list[EmulatedExecutor] = []
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part) for part in desk.parts()]
            running += [tasks.create_task(a.run()) for a in await self._agents(executors)]
            running.append(tasks.create_task(self._arrivals(case.trace, driver, records)))
            await self._play(records, len(case.trace))
            for task in running:
                task.cancel()
        for executor in executors:
            await executor.close()
        for opened in self._buses:
            await opened.close()
        return self._digests

    async def _connect(self, name: str) -> Bus:
        bus = await Bus.connect(self._url, name)
        self._buses.append(bus)
        return bus

    async def _agents(self, executors: list[EmulatedExecutor]) -> list[Agent]:
        case = self._case
        host = EmulatedHost(self._clock, profile_cells(case.profile_csv.splitlines(), "case"))
        bus = await self._connect("workers")
        agents = []
        for up in case.cluster.leases(0, case.loads):
            batch_max = max((m.batch_max for m in up.models), default=1)
            executor = EmulatedExecutor(
                up.worker, host, case.cluster.gpu, media=False, batch_max=batch_max
            )
            executors.append(executor)
            settings = WorkerSettings(
                cluster=self._cluster,
                nats_url=self._url,
                state_dir=self._state_dir,
                host=up.host,
                heartbeat_us=10_000_000_000,
            )
            agents.append(Agent(up.worker, settings, bus, executor, self._clock, NoOpTracer()))
        return agents

    async def _arrivals(
        self, trace: Sequence[TraceRequest], driver: Driver, records: Records
    ) -> None:
        for item in trace:
            await self._clock.sleep_until(item.arrival_us)
            request = item.to_request()
            records.restore(_promise(request, item), item.arrival_us, 1)
            driver.post(values.Arrived(at_us=self._clock.now_us(), request=request))

    async def _play(self, records: Records, expected: int) -> None:
        while records.ended_count < expected:
            await self._quiet()
            if self._clock.settled():
                continue
            next_us = self._clock.next_wake_us()
            if next_us is None:
                raise RuntimeError(f"nothing left to happen, open: {records.open_ids()}")
            self._clock.advance_to(next_us)

    async def _quiet(self) -> None:
        quiet = 0
        before = -1
        while quiet < _QUIET_ROUNDS:
            for bus in self._buses:
                await bus.flush()
            for _ in range(_LOOP_PASSES):
                await asyncio.sleep(0)
            now = sum(bus.messages for bus in self._buses)
            quiet = quiet + 1 if now == before else 0
            before = now


class _Digests:
    """The live outlet, which also writes down each plan's digest."""

    def __init__(self, real: Publisher, digests: list[str]) -> None:
        self._real = real
        self._digests = digests

    async def turned(self, turn: Turn) -> None:
        if turn.plan is not None:
            self._digests.append(turn.digest)
        await self._real.turned(turn)


class _Kept:
    """Promises that are kept in no stream: time stands still while the broker would write."""

    def __init__(self, term: int) -> None:
        self.term = term

    async def append(self, promise: journal_pb2.Promise) -> int:
        return 1

    async def forget(self, request_id: str) -> None:
        """Nothing was kept."""

    async def drain(self, worker: str, draining: bool) -> None:
        """Nobody drains a worker here."""


class _Heartbeats:
    def __init__(self, leases: Leases, driver: Driver) -> None:
        self._leases, self._driver = leases, driver

    async def __call__(self, beat: mesh_pb2.Heartbeat) -> None:
        for fact in self._leases.heartbeat(beat, self._driver.stamp()):
            self._driver.post(fact)


class _Reports:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def __call__(self, report: mesh_pb2.StepReport) -> None:
        self._driver.post(translate.to_event(report, self._driver.stamp()))


def _promise(request: values.Request, item: TraceRequest) -> journal_pb2.Promise:
    spec = types_pb2.GenerationSpec(
        model=item.model,
        workflow=item.workflow,
        shape=types_pb2.Shape(width=item.width, height=item.height, frames=item.frames),
        steps=item.steps,
    )
    submit = control_pb2.SubmitRequest(
        request_id=request.id, request=generation_pb2.GenerateRequest(spec=spec)
    )
    return journal_pb2.Promise(submit=submit, answer=generation_pb2.Accepted(request_id=request.id))
