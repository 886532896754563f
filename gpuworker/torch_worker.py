"""Puts a torch worker's process together: device, models, executor, agent."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys

import msgspec
import torch

from gpuworker.agent import Agent
from gpuworker.config import EMBEDDED_MODEL, WorkerSettings
from gpuworker.models.loading import LoadError
from gpuworker.pool import run_pool
from gpuworker.torch_executor import TorchExecutor, load_cards, pick_device
from hocket import endpoints, telemetry
from hocket.bus import Bus, Subjects
from hocket.clock import SystemClock
from hocket.errors import HocketError

_THREAD_SWITCH_S = 0.0005  # heartbeats and reports must not wait long for the compute thread's GIL


def run(settings: WorkerSettings) -> int:
    """Runs `settings.count` workers; returns the process's exit status."""
    if not settings.model:
        settings = msgspec.structs.replace(settings, model=(str(EMBEDDED_MODEL),))
    set_native_environment()
    if settings.count == 1:
        return run_one(settings, settings.first_index)
    return run_pool(settings.count, settings.first_index, functools.partial(run_one, settings))


def run_one(settings: WorkerSettings, index: int) -> int:
    """Runs one worker until SIGTERM or SIGINT."""
    sys.setswitchinterval(_THREAD_SWITCH_S)
    try:
        asyncio.run(_serve(settings, index))
    except (HocketError, LoadError) as error:
        print(f"worker {settings.name_prefix}{index}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: WorkerSettings, index: int) -> None:
    name = f"{settings.name_prefix}{index}"
    stop = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    told = telemetry.setup("gpuworker", name, settings.state_dir, settings.log_level)
    try:
        device = pick_device(settings.device, index)
        cards = load_cards(settings.model, device)
        bus = await Bus.connect(settings.nats_url, name)
        executor = TorchExecutor(
            name,
            cards,
            device,
            settings.gpu or gpu_name(device.type, device.index or 0),
            bus,
            Subjects(settings.cluster),
            advertise=settings.advertise,
            groups_max=settings.groups_max,
            batch_max=settings.batch_max,
        )
        agent = Agent(name, settings, bus, executor, SystemClock(), told.tracer)
        endpoints.announce(settings.state_dir, name, executor.store_address)
        try:
            await run_until(agent, stop)
        finally:
            endpoints.withdraw(settings.state_dir, name)
            await executor.close()
            await bus.close()
    finally:
        told.close()


async def run_until(agent: Agent, stop: asyncio.Event) -> None:
    """Runs an agent until `stop` is set."""
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(agent.run())
        await stop.wait()
        serving.cancel()


def gpu_name(kind: str, index: int) -> str:
    """What profiles call a device where no name was given."""
    if kind == "cpu":
        return "cpu"
    name: str = torch.cuda.get_device_name(index)
    return name.lower().replace("nvidia ", "").split(" ")[0]


def set_native_environment() -> None:
    """Native libraries read it when they start: it has to stand before CUDA, NCCL, OpenMP."""
    for key, value in {
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": "60",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(key, value)
