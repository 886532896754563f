"""One direction of a simulated connection: in order, late, and sometimes held up."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .loop import SimulatedLoop

Delivery = Callable[..., object]


@dataclass
class Weather:
    """How bad the network is at present. Shared by all wires of a world; all zero is fine weather.

    Probabilities are per message; delays are in microseconds.
    """

    delay_us: int = 200  # at least half of it, at most one and a half
    slow: float = 0.0  # chance of a message that is late …
    slow_us: int = 0  # … by up to so much; what is behind it on its wire waits
    drop: float = 0.0  # of messages that may be lost (core messages of the broker)
    duplicate: float = 0.0  # of the same
    lost_answer: float = 0.0  # a store did what it was asked and its answer never comes


class Wire:
    """Carries deliveries in the order of `send`."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random, weather: Weather) -> None:
        self._loop = loop
        self._random = rng.random
        self._weather = weather
        self._queue: deque[tuple[int, Delivery, tuple[Any, ...]]] = deque()
        self._last_us = 0
        self._holds = 0
        self._look_at = loop.alarm(self._due)

    @property
    def under_way(self) -> int:
        return len(self._queue)

    def send(self, delivery: Delivery, *args: Any) -> None:
        """Calls the delivery with these, at the far end."""
        weather, random = self._weather, self._random
        late_us = int(weather.delay_us * (0.5 + random()))
        if weather.slow and random() < weather.slow:
            late_us += int(weather.slow_us * random())
        at_us = self._loop.now_us + late_us
        if at_us < self._last_us:
            at_us = self._last_us
        else:
            self._last_us = at_us
        self._queue.append((at_us, delivery, args))
        if len(self._queue) == 1:
            self._look_at(at_us)

    def hold(self) -> None:
        """Nothing comes through until as many `release` as `hold`."""
        self._holds += 1

    def release(self) -> None:
        self._holds -= 1
        assert self._holds >= 0
        self._due()

    def cut(self) -> int:
        """What is under way is lost; returns how much that was."""
        lost = len(self._queue)
        self._queue.clear()
        return lost

    def _due(self) -> None:
        now_us, queue = self._loop.now_us, self._queue
        while queue and not self._holds and queue[0][0] <= now_us:
            _, deliver, args = queue.popleft()
            deliver(*args)
        if queue and not self._holds:
            self._look_at(queue[0][0])
