"""Shortest remaining time first (GENSERVE, arXiv 2604.04335v1, section 6.1; GF-DiT's `srtf`).

Preemptive at step boundaries: `commit_steps` steps are handed out at a time, and at their end the
worker goes to whoever then has the least left, decode included. The papers leave open the degree
(`degree`: 1, the natural reading of GENSERVE, is also best in its workload; 0 is each shape's
fastest), `commit_steps`, and whether others may pass a head that does not fit (`overtake`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from control.scheduler.policies.remaining import remaining_us
from control.scheduler.settings import SettingValue, Spec

from .sjf import Sjf

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene, Work


class Srtf(Sjf):
    """Shortest remaining time first, a few steps at a time."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        **Sjf.SPECS,
        "degree": Spec(1, low=0, high=4096),  # 0: the fastest
        "commit_steps": Spec(1, low=1, high=100_000),
    }

    def __init__(self, read: Mapping[str, SettingValue]) -> None:
        super().__init__(read)
        self._commit_steps = int(read["commit_steps"])

    def _rank(self, scene: Scene, work: Work, degree: int) -> tuple[int, int, int, int]:
        return (-work.request.priority, remaining_us(scene, work, degree), work.order, 0)

    def _steps(self, work: Work) -> int:
        return min(self._commit_steps, work.steps_left)
