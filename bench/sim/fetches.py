"""Copies of latents on their way to other workers: what a plan's fetches cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Container

import msgspec

from control.scheduler.values import Fetch, Held, Plan, WorkerUp


class Fetches:
    """All take the same time, so those under way come in in the order in which they went."""

    def __init__(self, cost_us: int) -> None:
        self.told: dict[str, WorkerUp] = {}  # what each worker said of itself last
        self._cost_us = max(1, cost_us)
        self._under_way: deque[tuple[int, Fetch]] = deque()

    def go(self, plan: Plan) -> None:
        """Takes a plan's fetches in."""
        self._under_way += [(plan.now_us + self._cost_us, fetch) for fetch in plan.fetches]

    def next_us(self) -> int | None:
        """When a copy is there next."""
        return self._under_way[0][0] if self._under_way else None

    def come(
        self, now_us: int, latents: dict[str, dict[str, int]], living: Container[str]
    ) -> list[WorkerUp]:
        """Enters copies that are there now, and tells of them; of those whose holder, or whose
        worker, is gone nobody tells.
        """
        facts: list[WorkerUp] = []
        while self._under_way and self._under_way[0][0] <= now_us:
            fetch = self._under_way.popleft()[1]
            copies = latents.get(fetch.request, {})
            if fetch.worker not in living or copies.get(fetch.holder) != fetch.steps_done:
                continue
            copies[fetch.worker] = max(copies.get(fetch.worker, 0), fetch.steps_done)
            held = (Held(request=fetch.request, steps_done=copies[fetch.worker]),)
            told = self.told[fetch.worker]
            facts.append(msgspec.structs.replace(told, at_us=now_us, latents=held))
        return facts
