"""Diffusers-S (LegoDiffusion artifact `shepherd`, notes section 1.8): a planned partition.

As `diffusers`, but workers are dealt out in proportion to load, at least one a pipeline. The
artifact's planner ran beforehand; its outcome is a list for `partition`, say
"a=0,1,4,5;b=2,6;c=3,7". Without one, load is what has been observed: GPU time of the requests that
arrived so far, dealt evenly before the first of them, looked at again every `replan_us` (0: never).
A worker that changes sides loads its new pipeline when it first runs it; as many as possible stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from control.scheduler.policies.remaining import total_us
from control.scheduler.policies.shares import largest_remainder
from control.scheduler.settings import SettingValue, Spec
from control.scheduler.starts import Decision

from .diffusers import Diffusers

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene


class DiffusersS(Diffusers):
    """Workers in proportion to load."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        **Diffusers.SPECS,
        "replan_us": Spec(30_000_000, low=0),
    }

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        super().__init__(settings)
        self._replan_us = int(settings["replan_us"])
        self._planned_us: int | None = None
        self._counted = -1  # order of the last request in the sums
        self._load_us: dict[str, int] = {}

    def decide(self, scene: Scene) -> Decision:
        for tracked in scene.tracked():
            if tracked.order > self._counted:
                self._counted = tracked.order
                model = tracked.request.model
                spent_us = total_us(scene, tracked.request, 1)
                self._load_us[model] = self._load_us.get(model, 0) + spent_us
        if self._planned_us is None:
            self._planned_us = scene.now_us
        if self._replan_us and scene.now_us - self._planned_us >= self._replan_us:
            self._planned_us = scene.now_us
            self._seats = ()  # deals anew
        return super().decide(scene)

    def deal(self, scene: Scene) -> dict[str, frozenset[str]]:
        models = sorted({m for s in scene.seats for m in s.worker.models})
        even = super().deal(scene)
        if self._partition or not self._serves or len(models) >= len(scene.seats):
            return even
        load = {m: float(self._load_us.get(m, 0)) for m in models}
        spare = len(scene.seats) - len(models)
        wanted = {m: 1 + n for m, n in largest_remainder(load, spare).items()}
        serves: dict[str, frozenset[str]] = {}
        for seat in scene.seats:  # those who stay
            own = self._serves.get(seat.name, frozenset())
            keep = next((m for m in models if m in own and wanted[m] and seat.worker.can(m)), None)
            if keep is not None:
                serves[seat.name] = frozenset({keep})
                wanted[keep] -= 1
        for seat in scene.seats:
            if seat.name not in serves:
                able = [m for m in models if wanted[m] and seat.worker.can(m)]
                serves[seat.name] = frozenset(able[:1])
                if able:
                    wanted[able[0]] -= 1
        return serves
