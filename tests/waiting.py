"""Waiting for what happens in other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

WAIT_S = 60.0
_POLL_S = 0.01


async def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds. It polls: other processes send this one no event."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
