"""Puts a process of emulated workers together: one event loop, one shared host, many agents."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gpuworker.agent import Agent
from gpuworker.config import WorkerSettings
from gpuworker.emulation.executor import EmulatedExecutor, EmulatedHost
from gpuworker.emulation.profile import Cell, profile_cells
from gpuworker.mesh.ending import ended_with
from gpuworker.mesh.naming import worker_name
from gpuworker.mesh.stopping import StopSignals, run_until
from gpuworker.operations.names import ROLES
from hocket.clock import SystemClock
from hocket.errors import WrongConfig
from hocket.messaging.bus import Bus
from hocket.security.identity import Identity, broker_access
from hocket.tracing import telemetry


def run(settings: WorkerSettings) -> int:
    """Runs `settings.count` emulated workers in this process until SIGTERM or SIGINT."""
    return ended_with("emulated", lambda: asyncio.run(_serve(settings)))


def read_profile(path: Path | None) -> dict[Cell, int]:
    """The call times to emulate by; raises WrongConfig where there are none."""
    wanted = "a profile CSV to emulate by"
    if path is None:
        raise WrongConfig(key="profile", value="", allowed=wanted)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WrongConfig(key="profile", value=str(path), allowed=f"{wanted} ({reason})") from error
    cells = profile_cells(text.splitlines(), str(path))
    if not cells:
        raise WrongConfig(key="profile", value=str(path), allowed=f"{wanted} (it has no rows)")
    return cells


async def _serve(settings: WorkerSettings) -> None:
    profile = read_profile(settings.profile)
    told = telemetry.setup("gpuworker", "emulated", settings.state_dir, settings.log_level)
    signals = StopSignals()
    signals.listen()
    clock = SystemClock()
    host = EmulatedHost(clock=clock, profile=profile)
    access = broker_access(Identity.load(settings.tls_dir), "worker")
    bus = await Bus.connect(settings.nats_url, "emulated", access=access)
    executors, agents = [], []
    try:
        for index in range(settings.first_index, settings.first_index + settings.count):
            name = worker_name(settings, index)
            executor = EmulatedExecutor(
                name,
                host,
                settings.gpu or "emulated",
                batch_max=settings.batch_max,
                groups_max=settings.groups_max,
                roles=settings.role or ROLES,
            )
            executors.append(executor)
            agents.append(Agent(name, settings, bus, executor, clock, told.tracer))
        await run_until(agents, signals)
    finally:
        for executor in executors:
            await executor.close()
        await bus.close()
        told.close()
