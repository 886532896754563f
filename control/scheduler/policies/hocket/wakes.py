"""When a pod is to be looked at again, with a lead: that long before the next end of a run in it.

A heap of pods by that time. A pod's time is worked out anew when it was planned, when a run of its
workers got on or ended, or when its time has passed; the others are not looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ...books.ledger import Ledger
from .pods import Pod, Pods, flight_end_us


class Wakes:
    """Times at which pods are due. Without a lead none is: reports tell of ends."""

    def __init__(self, lead_us: int) -> None:
        self._lead_us = lead_us
        self._heap: list[tuple[int, int]] = []  # time, index of the pod
        self._times_us: dict[int, int] = {}  # by index: which of its times in the heap counts
        self._pods: list[Pod] = []  # as of the last plan

    def planned(self, ledger: Ledger, pods: Pods, concerned: Iterable[Pod], now_us: int) -> None:
        """Pods were decided on."""
        if not self._lead_us:
            return
        if ledger.moved is None:
            ledger.moved = {}
        if pods.pods is not self._pods:
            self._pods = pods.pods
            self._heap.clear()
            self._times_us.clear()
            concerned = self._pods
        for pod in concerned:
            self._enter(ledger, pod, now_us)

    def due(self, ledger: Ledger, pods: Pods, planned_us: int | None, now_us: int) -> list[int]:
        """Indices of the pods whose time came since the last plan."""
        if not self._lead_us or planned_us is None or pods.pods is not self._pods:
            return []
        self._follow(ledger, pods, planned_us)
        found: list[int] = []
        while self._heap and self._heap[0][0] <= now_us:
            us, index = heapq.heappop(self._heap)
            if self._times_us.get(index) == us:
                del self._times_us[index]
                found.append(index)
        return found

    def next_us(self, ledger: Ledger, pods: Pods, planned_us: int | None) -> int | None:
        """The first time after the last plan."""
        if not self._lead_us or planned_us is None:
            return None
        self._follow(ledger, pods, planned_us)
        while self._heap:
            us, index = self._heap[0]
            if self._times_us.get(index) == us and us > planned_us:
                return us
            heapq.heappop(self._heap)
            if self._times_us.get(index) == us:
                self._enter(ledger, self._pods[index], planned_us)
        return None

    def _follow(self, ledger: Ledger, pods: Pods, planned_us: int) -> None:
        """Runs got on, or ended, or were called off."""
        moved, ledger.moved = ledger.moved or {}, {}
        homes = (pods.home.get(worker) for worker in moved)
        for index in sorted({pod.index for pod in homes if pod is not None}):
            if index < len(self._pods):
                self._enter(ledger, self._pods[index], planned_us)

    def _enter(self, ledger: Ledger, pod: Pod, planned_us: int) -> None:
        hands = {s for w in pod.workers for s in pod.running(ledger, w.name)}
        times = (flight_end_us(ledger, s) - self._lead_us for s in hands)
        us = min((t for t in times if t > planned_us), default=None)
        self._times_us.pop(pod.index, None)
        if us is not None:
            self._times_us[pod.index] = us
            heapq.heappush(self._heap, (us, pod.index))
