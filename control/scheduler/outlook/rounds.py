"""The round grid: which window a plan made now is for.

    boundary        boundary        boundary
       ├── round r ────┤── round r+1 ──┤
           ▲       ▲ lead
           │       └ plan for round r+1: window = round r+1
           └ a fact: amendment, window = the rest of round r

Rounds are half-open: a fact stamped exactly at a boundary belongs to the round that begins there. A
cluster without denoising work has no grid; the first work anchors a new one at once. With `rounds`
off there is no grid at all: every planning point opens a window of one round's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..settings import Settings


class WindowKind(Enum):
    """What a plan may decide."""

    ROUND = "round"  # the next assignments of all jobs
    AMENDMENT = "amendment"  # idle workers for waiting jobs
    EVENT = "event"  # as ROUND, but only what can start now is sent; the rest reserves


@dataclass(frozen=True, slots=True)
class Window:
    """The span that a plan is for: start_us inclusive, end_us exclusive."""

    kind: WindowKind
    round: int
    start_us: int
    end_us: int

    @property
    def length_us(self) -> int:
        return self.end_us - self.start_us


class RoundGrid:
    """Numbers rounds and knows the next boundary that nobody has planned for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.number = 0
        self.boundary_us: int | None = None

    def open(self, now_us: int, round_us: int, denoising: bool) -> Window | None:
        """The window of a plan made now, the grid moved on accordingly; None: nothing to decide."""
        s = self._settings
        if not s.rounds:
            self.number += 1
            return Window(WindowKind.EVENT, self.number, now_us, now_us + round_us)
        if not denoising or self.boundary_us is None:
            return self._next(now_us, now_us + round_us)
        if now_us >= self.boundary_us - s.lead_us:
            boundary_us = self.boundary_us
            if boundary_us < now_us:  # planning came late, or nothing was left to plan for a while
                boundary_us += (now_us - boundary_us) // round_us * round_us
            return self._next(max(boundary_us, now_us), boundary_us + round_us)
        if not s.amend:
            return None
        return Window(WindowKind.AMENDMENT, self.number, now_us, self.boundary_us)

    def _next(self, start_us: int, end_us: int) -> Window:
        self.number += 1
        self.boundary_us = end_us
        return Window(WindowKind.ROUND, self.number, start_us, end_us)
