"""Resolution-specific static parallelism, RSSP (TetriServe, arXiv 2510.01565, section 6.1).

    pixels ──▶ degree, chosen offline: 256 -> 1, 512 -> 1, 1024 -> 2, 2048 -> 8

A static oracle whose degrees know no deadline: every request keeps its own from its first step to
its last. The paper leaves open the queue discipline (`queue`: by deadline is the better one in the
paper's own workload, by arrival the wholly deadline-blind reading), whether narrower work may pass
a head that does not fit (`overtake`), and sizes off its list: those take the degree of the nearest
one, and any degree is clipped to what the shape's model offers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from control.scheduler.policies.base import EventPolicy
from control.scheduler.policies.remaining import at_most, nearest, read_table
from control.scheduler.settings import Settings, SettingValue, Spec
from control.scheduler.starts import Decision, Start
from control.scheduler.values import DIT, TEXT, Request

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene, Work


class Rssp(EventPolicy):
    """A degree by pixels, to completion."""

    NAME = "rssp"
    SPECS: ClassVar[Mapping[str, Spec]] = {
        "degrees": Spec("256=1,512=1,1024=2,2048=8"),  # side of a square = degree
        "queue": Spec("edf", allowed=("fcfs", "edf")),
        "overtake": Spec(True),
    }

    def __init__(self, read: Mapping[str, SettingValue]) -> None:
        self._table = read_table(f"{self.NAME}.degrees", str(read["degrees"]))
        self._by_deadline = read["queue"] == "edf"
        self._overtake = bool(read["overtake"])

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> Rssp:
        """From its own settings."""
        return cls(read)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """Pixels are not known here: the table's widest that runs no slower than a narrower one."""
        widest = at_most(tuple(sorted(step_us)), max(k for _, k in self._table))
        return min(step_us, key=lambda k: (k > widest, step_us[k], k))

    def degree(self, request: Request) -> int:
        """Its static degree, before clipping."""
        return nearest(self._table, request)

    def decide(self, scene: Scene) -> Decision:
        """Higher priority first, then by deadline, or who is mid-way and by arrival."""
        placement = scene.placement()
        starts: list[Start] = []
        for work in sorted(scene.works, key=self._rank):
            degree = 1
            if work.node == DIT:
                degree = at_most(scene.degrees(work.request), self.degree(work.request))
            members = scene.place(placement, work, degree)
            if members is not None:
                starts.append(Start((work.id,), work.node, members, work.steps_left, self.NAME))
            elif not self._overtake:
                break
        return Decision(starts)

    def _rank(self, work: Work) -> tuple[int, bool, int, int]:
        deadline_us = work.request.deadline_us
        if not self._by_deadline:
            return (-work.request.priority, work.node == TEXT, 0, work.order)
        return (-work.request.priority, deadline_us is None, deadline_us or 0, work.order)
