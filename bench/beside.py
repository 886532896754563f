"""How long the event loop is held while the scheduler works beside it, as in the control plane."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from control.planning import PlannerThread
from hocket import garbage
from hocket.clock import steady_ns

T = TypeVar("T")

TICK_MS = 1.0


async def beside(work: Callable[[], T]) -> tuple[T, list[float]]:
    """What `work` returns, run in the planner's thread; by how many ms each tick of a loop that
    does nothing else came late meanwhile.
    """
    garbage.take_over()
    planner = PlannerThread()
    working = asyncio.ensure_future(planner.run(work))
    late_ms: list[float] = []
    while not working.done():
        began_ns = steady_ns()
        await asyncio.sleep(TICK_MS / 1e3)
        late_ms.append((steady_ns() - began_ns) / 1e6 - TICK_MS)
    planner.close()
    return working.result(), late_ms
