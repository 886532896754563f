"""Waiting on a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hocket.clock import Clock

T = TypeVar("T")


async def until(clock: Clock, at_us: int, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns or raises; None, and `work` cancelled, when it is not done by then."""
    task = asyncio.ensure_future(work)
    timer = asyncio.ensure_future(clock.sleep_until(at_us))
    try:
        await asyncio.wait((task, timer), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        timer.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
