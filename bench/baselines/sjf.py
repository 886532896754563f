"""Shortest job first (GENSERVE, arXiv 2604.04335v1, section 6.1; GF-DiT's `sjf`).

Order: the estimated run time of the *whole* request; no preemption: who has begun runs all its
steps, and goes on to its decode before anybody begins. The papers leave open the degree (`degree`:
the natural reading of GENSERVE is 1; 0, each shape's fastest, serves 20 to 28 points more of its
own workload and is the default) and whether others may pass a head that does not fit (`overtake`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from control.scheduler.policies.base import EventPolicy
from control.scheduler.policies.remaining import at_most, fastest, total_us, wanted
from control.scheduler.settings import Settings, SettingValue, Spec
from control.scheduler.starts import Decision, Start
from control.scheduler.values import DIT, TEXT

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene, Work


class Sjf(EventPolicy):
    """Shortest total time first, to completion."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        "degree": Spec(0, low=0, high=4096),  # 0: the fastest
        "overtake": Spec(True),
    }

    def __init__(self, read: Mapping[str, SettingValue]) -> None:
        self._degree = int(read["degree"])
        self._overtake = bool(read["overtake"])

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> Sjf:
        """From its own settings."""
        return cls(read)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The one set, or the fastest."""
        if self._degree == 0:
            return fastest(step_us)
        return at_most(tuple(sorted(step_us)), self._degree)

    def decide(self, scene: Scene) -> Decision:
        """Higher priority, then who has begun, then the shortest."""
        placement = scene.placement()
        degrees = {w.id: wanted(scene, w.request, self._degree) for w in scene.works}
        starts: list[Start] = []
        for work in sorted(scene.works, key=lambda w: self._rank(scene, w, degrees[w.id])):
            degree = degrees[work.id] if work.node == DIT else 1
            members = scene.place(placement, work, degree)
            if members is not None:
                starts.append(Start((work.id,), work.node, members, self._steps(work), "shortest"))
            elif not self._overtake:
                break
        return Decision(starts)

    def _rank(self, scene: Scene, work: Work, degree: int) -> tuple[int, int, int, int]:
        begun = work.node != TEXT
        size_us = total_us(scene, work.request, degree)
        return (-work.request.priority, not begun, size_us, work.order)

    def _steps(self, work: Work) -> int:
        return work.steps_left
