"""Waiting for code that may swallow a cancellation.

Before Python 3.12 `asyncio.wait_for`, which nats-py uses in every request, returns a result that
comes in the same step as a cancellation, and the cancellation is lost: a loop around it then never
ends. Before 3.13 a task group does so whose own task fails in the step of the cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def cancellable(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; a cancellation ends the wait whatever `work` makes of it."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        task.add_done_callback(_seen)
        raise
    return task.result()


def end_if_cancelled() -> None:
    """Raises CancelledError where the running task was cancelled and a task group lost that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
