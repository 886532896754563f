"""Diffusers-C (LegoDiffusion artifact `clockwork`, notes section 1.8): pipelines swapped on demand.

Every pipeline may run on every worker; all lie in host memory, and a worker swaps whole pipelines,
least recently used first out, when the one that it is given is not there. The artifact gives a
request the lowest-ranked idle worker, whatever that has loaded: far weaker than the real Clockwork,
which plans loads. `residency_aware` (default, better) prefers an idle worker that has the pipeline,
then one with room for it; false: the artifact's rule.

The sources leave open what a swap costs beyond the loads: `swap_out_us`, offloading what goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from control.scheduler.settings import SettingValue, Spec

from .diffusers import Parts, Pipelines

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene, Seat
    from control.scheduler.values import Request


class DiffusersC(Pipelines):
    """Every pipeline everywhere."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        **Pipelines.SPECS,
        "residency_aware": Spec(True),
        "swap_out_us": Spec(0, low=0),
    }

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        super().__init__(settings)
        self._aware = bool(settings["residency_aware"])
        self._swap_out_us = int(settings["swap_out_us"])

    def choose(self, scene: Scene, request: Request, idle: Iterable[Seat]) -> Seat | None:
        if not self._aware:
            return super().choose(scene, request, idle)

        def swaps(seat: Seat) -> tuple[bool, bool, int]:
            loaded = self._loaded.get(seat.name, [])
            used_mib = sum(scene.footprint_mib(seat.name, m) for m in (*loaded, request.model))
            full = used_mib > seat.worker.memory_mib * self._budget
            return (request.model not in loaded, full, seat.index)

        return min(idle, key=swaps, default=None)

    def enter(self, scene: Scene, seat: Seat, model: str) -> tuple[Parts | None, int]:
        before = list(self._loaded.get(seat.name, []))
        stay = self.swap(scene, seat, model)
        gone = set(before) - set(self._loaded.get(seat.name, []))
        return stay, self._swap_out_us if gone else 0
