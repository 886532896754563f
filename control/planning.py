"""Where the scheduler runs: beside the event loop, in one thread of its own, or inline.

The scheduler belongs to whoever runs here; the event loop never calls it. One thread means that
everything asked of it happens one after another, in the order in which it was asked. Drivers on a
manual clock run it inline: then an instant is over when nothing is left to happen on the loop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")

_SWITCH_S = 0.000_5  # how long one thread keeps the interpreter while the other wants it


class Planning(Protocol):
    """Runs work on the scheduler, one piece at a time, in order."""

    async def run(self, work: Callable[[], T]) -> T:
        """What `work()` returns or raises."""

    def close(self) -> None:
        """Returns when the piece under way is over."""


class Inline:
    """On the event loop itself."""

    async def run(self, work: Callable[[], T]) -> T:
        return work()

    def close(self) -> None:
        """Nothing is under way."""


class PlannerThread:
    """Beside the event loop, which goes on reading and writing meanwhile."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        sys.setswitchinterval(_SWITCH_S)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
