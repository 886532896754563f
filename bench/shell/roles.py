"""What runs in the simulated processes: the services' own start functions, as their commands call
them. Only the worker is put together here, as `gpuworker.emulation.worker` does it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

import grpc
from opentelemetry.trace import NoOpTracer, Tracer

from control import service as control_service
from control.config import ControlSettings
from gateway import service as gateway_service
from gateway.settings import GatewaySettings
from gpuworker.agent import Agent
from gpuworker.config import WorkerSettings
from gpuworker.emulation.executor import EmulatedExecutor, EmulatedHost
from gpuworker.executor import Listener, Room, RunNote, always_room
from hocket.messaging.bus import Bus
from hocket.rpc.interceptors import Wrapping
from hocket.tracing.metrics import Gauges
from hocket.tracing.telemetry import Telemetry

from .loop import SimulatedProcess
from .toy_model import CLUSTER, GPU, PROFILE
from .waits import SimulatedClock
from .world import Role, World

_URL = "nats://simulated:4222"


@dataclass(frozen=True)
class _Untold:
    """Telemetry that goes nowhere."""

    tracer: Tracer
    gauges: Gauges = Gauges(None)  # noqa: RUF009

    def server_wrappings(self, *_: object, **__: object) -> list[Wrapping]:
        return []

    def client_interceptors(self) -> list[grpc.aio.ClientInterceptor]:
        return []


_TOLD = cast(Telemetry, _Untold(NoOpTracer()))


def clock_of(world: World, process: SimulatedProcess) -> SimulatedClock:
    """Each process's clock has an origin of its own: no two can be compared."""
    origin_us = sum(process.name.encode()) * 1_000_003 % 500_000_000
    return SimulatedClock(world.loop, origin_us)


def control(index: int) -> Role:
    """A control replica."""

    async def run(world: World, process: SimulatedProcess) -> None:
        settings = ControlSettings(
            cluster=CLUSTER,
            nats_url=_URL,
            state_dir=world.state_dir,
            listen=f"control-{index}:0",
            policy=world.policy,
            requests_open_max=world.open_max,
            lease_us=5_000_000,
        )
        profile = world.state_dir / "toy.csv"
        if not profile.exists():
            profile.write_text(PROFILE)
        stop = asyncio.Event()
        process.on_terminate = stop.set
        await control_service.serve(settings, clock_of(world, process), _TOLD, stop)

    return run


def gateway_address(index: int) -> str:
    return f"gateway-{index}:7433"


def gateway(index: int) -> Role:
    """A gateway."""

    async def run(world: World, process: SimulatedProcess) -> None:
        settings = GatewaySettings(
            cluster=CLUSTER,
            nats_url=_URL,
            state_dir=world.state_dir,
            listen=gateway_address(index),
        )
        stop = asyncio.Event()
        process.on_terminate = stop.set
        async with gateway_service.running(settings, _TOLD):
            await stop.wait()

    return run


def worker(index: int, host: EmulatedHost | None = None, key: str = "") -> Role:
    """A worker with an emulated executor, on the host that all share or on one of its own; `key`:
    the executor's in `World.executors`, where that is not the worker's name.
    """

    async def run(world: World, process: SimulatedProcess) -> None:
        settings = WorkerSettings(
            cluster=CLUSTER,
            nats_url=_URL,
            state_dir=world.state_dir,
            host=f"host-{index % 2}",
            heartbeat_us=1_250_000,
        )
        name, home = f"w{index}", host or world.emulated
        executor = _Observed(name, home, GPU)
        executor.observer = lambda note: world.work.note(name, process.name, note, world.now_us)
        world.executors[key or name] = executor
        process.at_death.append(lambda: home.close(name))
        bus = await Bus.connect(_URL, name)
        agent = Agent(name, settings, bus, executor, clock_of(world, process), _TOLD.tracer)
        running = asyncio.get_running_loop().create_task(agent.run())
        process.on_terminate = running.cancel
        try:
            await running
        except asyncio.CancelledError:
            if not running.cancelled():
                raise
        finally:
            world.executors.pop(key or name, None)
            await executor.close()
            await bus.close()

    return run


class _Observed(EmulatedExecutor):
    """Says what it does to whoever observes the world, too."""

    observer: Listener

    def start(self, listener: Listener, room: Room = always_room) -> None:
        def hear(note: RunNote) -> None:
            self.observer(note)
            listener(note)

        super().start(hear, room)
