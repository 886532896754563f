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
        await one_done(task)
    except asyncio.CancelledError:
        task.cancel()
        task.add_done_callback(_seen)
        raise
    return task.result()


async def one_done(*futures: asyncio.Future[Any]) -> None:
    """Waits until one of them is done: `asyncio.wait` at a third of its cost."""
    if any(future.done() for future in futures):
        return
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(_: object) -> None:
        if not waiter.done():
            waiter.set_result(None)

    for future in futures:
        future.add_done_callback(wake)
    try:
        await waiter
    finally:
        for future in futures:
            future.remove_done_callback(wake)


def end_if_cancelled() -> None:
    """Raises CancelledError where the running task was cancelled and a task group lost that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
