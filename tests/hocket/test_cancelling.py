"""A cancellation that Python loses is found again."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from hocket.cancelling import cancellable, end_if_cancelled, one_done


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


async def test_one_of_several_is_waited_for() -> None:
    loop = asyncio.get_running_loop()
    one, other = loop.create_future(), loop.create_future()
    waiting = asyncio.ensure_future(one_done(one, other))
    await asyncio.sleep(0)
    assert not waiting.done()
    other.set_exception(_Over())
    await waiting
    assert not one.done()
    with pytest.raises(_Over):
        await other
    await one_done(one, other)  # at once


async def test_a_wait_that_is_cancelled_ends_though_its_work_does_not() -> None:
    released = asyncio.Event()

    async def deaf() -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError):  # as a library does that loses it
                await released.wait()

    waiting = asyncio.ensure_future(cancellable(deaf()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    released.set()
