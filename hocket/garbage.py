"""Python's cycle collector, kept from standing in the event loop's way.

A full collection looks at every container there is: with thousands of requests that takes some
hundred milliseconds, in whichever thread it strikes. So what has lived for a while is set aside
(`gc.freeze`), young garbage is collected as ever, and a full collection comes when no request is
open, or at long last all the same.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import NoReturn

from hocket.clock import Clock

_YOUNG, _MIDDLE, _NEVER = 20_000, 20, 1 << 30
_EVERY_US = 10_000_000
_FULL_EVERY_US_MIN = 60_000_000  # while nothing is open
_FULL_EVERY_US_MAX = 1_800_000_000


def take_over() -> None:
    """Full collections are `keep`'s from now on; what start-up made is set aside."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _NEVER)


async def keep(clock: Clock, is_idle: Callable[[], bool]) -> NoReturn:
    """Sets aside and collects, until cancelled; does nothing where nobody has taken over."""
    full_us = clock.now_us()
    while True:
        await clock.sleep_until(clock.now_us() + _EVERY_US)
        if gc.get_threshold()[2] != _NEVER:
            continue
        since_us = clock.now_us() - full_us
        if since_us >= _FULL_EVERY_US_MAX or (is_idle() and since_us >= _FULL_EVERY_US_MIN):
            gc.unfreeze()
            gc.collect()
            full_us = clock.now_us()
        await asyncio.sleep(0)
        gc.freeze()
