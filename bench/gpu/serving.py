"""A whole mesh on this machine's GPU, with pictures of mixed sizes arriving at random.

The model has random weights, so that nothing need be fetched; what is measured are latencies and
deadlines. Each size's deadline is a multiple of what it takes alone, measured first.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from hocket.client import HocketClient
from hocket.clock import SystemClock, steady_ns
from hocket.errors import HocketError
from hocket.launching.launcher import MeshPlan, mesh

PROMPT = "a fox on a green background"
SEED = 20
SLACK = 2.5  # a deadline, in times of what the size takes alone
LOAD = 0.7  # of what the workers could do one by one
_CALL_S = 600.0


@dataclass(frozen=True)
class Served:
    """One request and how it went."""

    side: int
    arrival_us: int
    deadline_s: float
    latency_s: float
    outcome: str  # "finished", or the reason why it did not

    @property
    def met(self) -> bool:
        return self.outcome == "finished" and self.latency_s <= self.deadline_s


async def measure_serving(
    tiny: bool, workers: int, minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Latencies, and which deadlines were met."""
    sides, steps, requests = ((32, 64), 4, 6) if tiny else ((512, 768, 1024), 28, 60)
    with tempfile.TemporaryDirectory(prefix="hocket-gpu-") as place:
        folder = Path(place) / "random-flux"
        await _written(folder, tiny)
        plan = MeshPlan(
            state_dir=Path(place) / "state",
            workers=workers,
            models=(str(folder),),
            log_level="warning",
        )
        async with mesh(plan, say) as running, HocketClient(running.gateway) as client:
            alone_s = {side: await _alone_s(client, side, steps, say) for side in sides}
            gap_s = mean(alone_s.values()) / workers / LOAD
            most = int(minutes * 60 / gap_s / 2) if gap_s else requests
            served = await _all(client, alone_s, steps, min(requests, max(1, most)), gap_s)
    say(f"{sum(s.met for s in served)} of {len(served)} in time")
    return {
        "workers": workers,
        "steps": steps,
        "seed": SEED,
        "slack": SLACK,
        "load": LOAD,
        "alone_s": alone_s,
        "requests": [asdict(s) | {"met": s.met} for s in served],
    }


async def _written(folder: Path, tiny: bool) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gpuworker.measuring.folders", str(folder)),
        *(["--tiny"] if tiny else []),
        stderr=asyncio.subprocess.PIPE,
    )
    _, told = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"no model folder: {told.decode()[-400:]}")


async def _alone_s(
    client: HocketClient, side: int, steps: int, say: Callable[[str], None]
) -> float:
    """Of three requests one by one the fastest: the first ones warm kernels and groups."""
    best = min([await _latency_s(client, side, steps, seed, 0.0) for seed in range(3)])
    say(f"{side} px alone: {best:.2f} s")
    return best


async def _latency_s(
    client: HocketClient, side: int, steps: int, seed: int, deadline_s: float
) -> float:
    began_ns = steady_ns()
    await client.generate_media(
        PROMPT,
        shape=(side, side),
        steps=steps,
        seed=seed,
        deadline_s=deadline_s,
        timeout_s=_CALL_S,
    )
    return (steady_ns() - began_ns) / 1e9


async def _all(
    client: HocketClient, alone_s: dict[int, float], steps: int, count: int, gap_s: float
) -> list[Served]:
    """Poisson arrivals; the trace is the same for a seed and the times measured alone."""
    chance, clock = random.Random(SEED), SystemClock()
    began_us, arrival_us = clock.now_us(), 0
    calls: list[asyncio.Task[Served]] = []
    async with asyncio.TaskGroup() as tasks:
        for seed in range(count):
            arrival_us += int(chance.expovariate(1 / gap_s) * 1e6)
            side = chance.choice(list(alone_s))
            await clock.sleep_until(began_us + arrival_us)
            deadline_s = SLACK * alone_s[side]
            calls.append(
                tasks.create_task(_served(client, side, steps, seed, arrival_us, deadline_s))
            )
    return [call.result() for call in calls]


async def _served(
    client: HocketClient, side: int, steps: int, seed: int, arrival_us: int, deadline_s: float
) -> Served:
    began_ns, outcome = steady_ns(), "finished"
    try:
        await _latency_s(client, side, steps, seed, deadline_s)
    except HocketError as error:  # refused, or failed: a miss
        outcome = error.reason
    return Served(side, arrival_us, deadline_s, (steady_ns() - began_ns) / 1e9, outcome)
