"""A torch worker whose transfers are late now and then: `python -m bench.mesh.jittery_worker`.

What a user's worker runs, but for its store: a share of the fetches, drawn from a seed, begins
later. The fault lives here; the worker has a seam for its store and nothing else.
"""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import torch
import typer
from opentelemetry.trace import NoOpTracer

from gpuworker.agent import Agent
from gpuworker.collectives.rendezvous import Cancel, Rendezvous
from gpuworker.collectives.tunnel import Tunnel
from gpuworker.config import EMBEDDED_MODEL, WorkerSettings
from gpuworker.memory.latents import Shares
from gpuworker.memory.weights import WeightStore
from gpuworker.steps.prefetch import Ahead
from gpuworker.torch_executor import TorchExecutor, load_cards
from hocket.clock import SystemClock
from hocket.messaging.bus import Bus, Subjects

_CPU = torch.device("cpu")


class LateStore(Rendezvous):
    """A store from which some blobs come late."""

    def __init__(
        self, host: str, tunnel: Tunnel | None, *, late_s: float, share: float, seed: int
    ) -> None:
        super().__init__(host, tunnel)
        self._late_s, self._share, self._random = late_s, share, random.Random(seed)

    def fetch(
        self, address: str, key: str, timeout_s: float, cancel: Cancel | None = None
    ) -> bytes:
        if self._random.random() < self._share:
            threading.Event().wait(self._late_s)
        return super().fetch(address, key, timeout_s, cancel)


def main(
    name: str, url: str, cluster: str, state: Path, ahead: int, late_ms: float, share: float
) -> None:
    """Serves the embedded model until it is ended."""
    torch.set_num_threads(1)
    asyncio.run(_serve(name, url, cluster, state, ahead, late_ms / 1e3, share))


async def _serve(
    name: str, url: str, cluster: str, state: Path, ahead: int, late_s: float, share: float
) -> None:
    def late(host: str, tunnel: Tunnel | None) -> Rendezvous:
        return LateStore(host, tunnel, late_s=late_s, share=share, seed=sum(name.encode()))

    bus, weights = await Bus.connect(url, name), WeightStore(_CPU)
    executor = TorchExecutor(
        name,
        load_cards((str(EMBEDDED_MODEL),), _CPU, weights),
        _CPU,
        "cpu",
        bus,
        Subjects(cluster),
        weights=weights,
        shares=Shares(),
        advertise="127.0.0.1",
        groups_max=4,
        ahead=Ahead(ahead),
        store_of=late,
    )
    settings = WorkerSettings(cluster=cluster, state_dir=state, drain_s=0)
    agent = Agent(name, settings, bus, executor, SystemClock(), NoOpTracer())
    try:
        await agent.run()
    finally:
        await executor.close()
        await bus.close()


if __name__ == "__main__":
    typer.run(main)
