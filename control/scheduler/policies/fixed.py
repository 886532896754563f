"""Fixed degree, first come first served: the `xDiT SP=k` baseline (TetriServe section 6.1).

Every request runs all its steps at one degree, in order of arrival, without preemption. The paper
leaves the queue discipline open: `overtake` says whether narrower work may pass a head that does
not fit. A shape that cannot be split that far runs at the widest degree below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from ..settings import Settings, SettingValue, Spec
from ..starts import Decision, Start
from ..workflow import Section
from .base import EventPolicy

if TYPE_CHECKING:
    from ..outlook.scene import Scene


class Fixed(EventPolicy):
    """Every request at one degree, to completion."""

    SPECS: ClassVar[Mapping[str, Spec]] = {"overtake": Spec(False)}

    def __init__(self, degree: int, overtake: bool) -> None:
        self._degree = degree
        self._overtake = overtake

    @classmethod
    def of_degree(cls, degree: int) -> Callable[[Settings, Mapping[str, SettingValue]], Fixed]:
        """The maker for one degree."""
        return lambda settings, read: cls(degree, bool(read["overtake"]))

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The one, or the widest below it."""
        return max((k for k in step_us if k <= self._degree), default=min(step_us, default=1))

    def decide(self, scene: Scene) -> Decision:
        """Higher priority first, then by arrival."""
        placement = scene.placement()
        starts: list[Start] = []
        waiting: set[Section] = set()
        for work in sorted(scene.works, key=lambda w: (-w.request.priority, w.order)):
            if work.section in waiting:
                continue
            degree = 1
            if work.section is Section.STEPPED:
                degree = self.likely_degree(dict.fromkeys(scene.degrees(work.request), 0))
            members = scene.place(placement, work, degree)
            if members is not None:
                starts.append(Start((work.id,), work.node, members, work.steps_left, "fcfs"))
            elif not self._overtake:
                if not scene.partial:
                    break
                waiting.add(work.section)  # for workers of which others have no use
        return Decision(starts)
