"""Independent workers, each the whole model: DisagFusion's baseline (notes 2.4 and 5.6).

LightX2V DP8: every GPU is a server of its own; a request goes to an idle one, first come first
served, and stays there from encode to decode. The published figures leave open what is loaded when,
and differ by a factor of four for it, so there are three variants:

    resident  what is there stays, as far as memory goes; on an A10 0.088 requests/s by the stage
              times. Models of one base share its weights: a pool of equals that never swaps
    offload   stage by stage: a worker holds only the weights of the stage that it runs
    reload    a new process for every request: weights from nothing, each stage's when it begins,
              after `restart_us`, in which the worker does nothing else; 0.022 requests/s take
              364 GPU seconds a request, of which 91 are work

Loads are priced by the table of weights. With no table, or workers that name no memory, loads are
free, and the variants are one but for `restart_us` (default 0: nothing was published).
Requests are never dropped (`drop` true: those that waited beyond their deadline are).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from control.scheduler.settings import SettingValue, Spec

from .diffusers import Parts, Pipelines

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene, Seat, Work


class Monolith(Pipelines):
    """Whole models, FIFO."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        **Pipelines.SPECS,
        "drop": Spec(False),
        "requeue": Spec("fifo", allowed=("fifo", "tail")),
        "variant": Spec("resident", allowed=("reload", "offload", "resident")),
        "restart_us": Spec(0, low=0),
    }

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        super().__init__(settings)
        self._variant = str(settings["variant"])
        self._restart_us = int(settings["restart_us"])

    def join(self, scene: Scene, seat: Seat) -> list[str]:
        return list(seat.worker.models) if self._variant == "resident" else []

    def enter(self, scene: Scene, seat: Seat, model: str) -> tuple[Parts | None, int]:
        if self._variant == "reload":
            return frozenset(), self._restart_us
        return None, 0

    def proceed(self, scene: Scene, seat: Seat, work: Work) -> Parts | None:
        if self._variant != "offload":
            return None
        return frozenset(scene.parts(seat.name, work.request.model, work.node))
