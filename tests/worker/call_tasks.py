"""Real workers in the processes of the pool: an agent on the bus, an executor, a compute thread."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from opentelemetry.trace import NoOpTracer

from gpuworker.agent import Agent
from gpuworker.config import WorkerSettings
from gpuworker.memory.latents import Shares
from gpuworker.memory.weights import WeightStore
from gpuworker.torch_executor import TorchExecutor, load_cards
from hocket.clock import SystemClock
from hocket.messaging.bus import Bus, Subjects
from tests.worker.worker_pool import CPU, Member

OPEN_S = 30.0


@dataclass
class _OpenWorker:
    """A worker that serves in a thread of this process."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    agent: Agent
    executor: TorchExecutor
    opened: threading.Event = field(default_factory=threading.Event)


_OPEN: dict[str, _OpenWorker] = {}


def open_worker(member: Member, folder: str, url: str, cluster: str, state_dir: str) -> str:
    """Starts a worker under the member's name; the address of its store."""
    opened = threading.Event()

    async def serve() -> None:
        torch.set_num_threads(1)
        bus = await Bus.connect(url, member.name)
        weights = WeightStore(CPU)
        executor = TorchExecutor(
            member.name,
            load_cards((folder,), CPU, weights),
            CPU,
            "cpu",
            bus,
            Subjects(cluster),
            weights=weights,
            shares=Shares(prompts_bytes=1 << 20),
            advertise="127.0.0.1",
            groups_max=4,
            batch_max=4,
        )
        settings = WorkerSettings(
            cluster=cluster, state_dir=Path(state_dir), heartbeat_us=100_000, drain_s=0
        )
        agent = Agent(member.name, settings, bus, executor, SystemClock(), NoOpTracer())
        loop, thread = asyncio.get_running_loop(), threading.current_thread()
        _OPEN[member.name] = _OpenWorker(loop, thread, agent, executor)
        opened.set()
        try:
            await agent.run()
        finally:
            await executor.close()
            await bus.close()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert opened.wait(OPEN_S), f"{member.name} did not open"
    return _OPEN[member.name].executor.store_address


def close_worker(member: Member) -> None:
    """Stops it."""
    worker = _OPEN.pop(member.name, None)
    if worker is not None:
        worker.loop.call_soon_threadsafe(worker.agent.stop)
        worker.thread.join(OPEN_S)
