"""A cancellation that Python loses is found again."""

from __future__ import annotations

import asyncio

import pytest

from hocket.cancelling import end_if_cancelled


class _Over(Exception):
    """A part of a round failed."""


async def _round(over: asyncio.Event) -> None:
    async def fail() -> None:
        await over.wait()
        raise _Over

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            await asyncio.Event().wait()
    except* _Over:
        pass


async def test_a_cancellation_in_the_step_of_a_failure_ends_the_loop() -> None:
    over = asyncio.Event()
    rounds = 0

    async def loop() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await _round(over)
            end_if_cancelled()

    task = asyncio.ensure_future(loop())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    over.set()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await task
    assert rounds == 1
