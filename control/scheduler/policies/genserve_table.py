"""What one of GENSERVE's decisions keeps while it is made. Sets of workers are bit masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..starts import Start
from ..values import Shape

if TYPE_CHECKING:
    from ..outlook.scene import Work


@dataclass(slots=True)
class Table:
    """One decision under way: who stands where, and what was given out."""

    names: tuple[str, ...]  # worker of each bit, in cluster order
    idle: int  # can be given work now
    open: int = 0  # idle, or under a video: what the solver plans over
    owned: int = 0  # under videos
    starts: list[Start] = field(default_factory=list)
    step_us: dict[tuple[str, Shape], dict[int, int]] = field(default_factory=dict)
    paused: dict[int, int] = field(default_factory=dict)  # leader -> videos that it keeps
    able: dict[str, int] = field(default_factory=dict)  # model -> workers that have it

    def mask(self, workers: Sequence[str]) -> int:
        """Their bits; those that are not usable have none."""
        return sum(1 << self.names.index(w) for w in workers if w in self.names)

    def workers(self, mask: int) -> tuple[str, ...]:
        return tuple(n for i, n in enumerate(self.names) if mask >> i & 1)

    def give(self, works: Sequence[Work], mask: int, steps: int, reason: str) -> None:
        names = tuple(w.id for w in works)
        self.starts.append(Start(names, works[0].node, self.workers(mask), steps, reason))
        self.idle &= ~mask
