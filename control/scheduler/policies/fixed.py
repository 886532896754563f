"""Fixed degree, first come first served: the `xDiT SP=k` baseline (TetriServe section 6.1).

A request gets the one degree, keeps its workers round after round, and is not preempted. FIFO is
the natural reading; the paper does not state the queue discipline. A shape that cannot be split
that far runs at the widest degree below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..rounds import Window
from ..settings import SettingValue, Spec
from .base import Candidate, Choice


class Fixed:
    """Every request at one degree, to completion."""

    SPECS: ClassVar[Mapping[str, Spec]] = {"degree": Spec(1, allowed=(1, 2, 4, 8))}

    def __init__(self, settings: Mapping[str, SettingValue], straddle: float) -> None:
        self._degree = int(settings["degree"])

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The one, or the widest below it."""
        return max((k for k in step_us if k <= self._degree), default=min(step_us))

    def choose(
        self, window: Window, candidates: tuple[Candidate, ...], workers: int
    ) -> tuple[Choice, ...]:
        """Started requests first: they keep their workers; then by arrival, no overtaking."""
        choices: list[Choice] = []
        left = workers
        for c in sorted(candidates, key=lambda c: (not c.group, -c.priority, c.order)):
            degree = self.likely_degree(c.mean_us)
            if degree > left:
                break
            left -= degree
            # Not a round-based policy: a step longer than a round must start all the same.
            choices.append(Choice(c.request, degree, c.steps_left, "fcfs", steps_min=1))
        return tuple(choices)
