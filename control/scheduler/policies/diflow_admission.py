"""DiFlow's admission at arrival ("early abort", LegoDiffusion notes section 1.5).

    slack = (deadline - arrival) - time of the request alone       no deadline: always admitted
    fewer requests inside than workers: admitted
    T = max(sum of work / workers, longest work) over requests inside; running nodes in full
    admitted iff T <= slack

The newcomer's own work is not in T. The source takes medians of a fixed table for the work of a
node and a client's figure for the time alone; here both are the profile's, at degree 1. It never
revises. A new leader judges again those that have not begun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..books.lifecycle import JobState
from ..values import Request
from .remaining import total_us

if TYPE_CHECKING:
    from ..books.tracker import Tracked
    from ..outlook.scene import Scene


class Admission:
    """Judges each request once."""

    def __init__(self) -> None:
        self._judged = -1  # order of the last request judged

    def turned_away(self, scene: Scene) -> dict[str, str]:
        """Newcomers that are not admitted, with the reason; in order of arrival."""
        inside: list[Tracked] = []
        new: list[Tracked] = []
        for tracked in scene.tracked():
            begun = any(job.state is not JobState.READY for job in tracked.first)
            (inside if begun or tracked.order <= self._judged else new).append(tracked)
        if new:
            self._judged = max(self._judged, *(t.order for t in new))
        prices = _Prices(scene)
        work_us: list[int] | None = None
        rejects: dict[str, str] = {}
        workers = max(1, len(scene.seats))
        for tracked in new:
            deadline_us = tracked.request.deadline_us
            if deadline_us is not None and len(inside) >= workers:
                if work_us is None:
                    work_us = [prices.left_us(t) for t in inside]
                slack_us = deadline_us - tracked.arrived_us - total_us(scene, tracked.request, 1)
                if max(sum(work_us) // workers, max(work_us)) > slack_us:
                    rejects[tracked.id] = "EARLY_ABORT"
                    continue
            inside.append(tracked)
            if work_us is not None:
                work_us.append(prices.left_us(tracked))
        return rejects


class _Prices:
    """Work of the nodes that a request has left."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._us: dict[tuple[str, object, str, str], int] = {}

    def left_us(self, tracked: Tracked) -> int:
        request, workflow = tracked.request, tracked.workflow
        left_us = (request.steps - tracked.steps_done) * self._call_us(request, workflow.stepped)
        for job in tracked.before:
            if job.state is not JobState.DONE:
                left_us += self._call_us(request, job.node)
        return left_us + sum(self._call_us(request, job.node) for job in tracked.after)

    def _call_us(self, request: Request, node: str) -> int:
        key = (request.model, request.shape, request.workflow, node)
        if key not in self._us:
            self._us[key] = self._scene.call_us(request, node)
        return self._us[key]
