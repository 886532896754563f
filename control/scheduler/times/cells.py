"""What was measured in one cell, and how it travels from one model to the next.

    window:  [ believed, believed, r, r, r … ]   the last WINDOW of these; r = measured / estimated
    recent:  (group, r) …                        who measured; to compare a group with the others

`believed` is what the cell's ratio was taken for before: 1, or the level a whole family moved to.
"""

from __future__ import annotations

from collections import deque

import msgspec

from ..values import Layout, Shape

WINDOW = 15  # ratios kept a cell
SETTLED = 3  # own measurements that make a cell's middle its own
RECENT = 20  # measurements of which it is known who made them
PEERS = 9  # newest measurements of others that one is compared with
PEERS_MIN = 2

Group = tuple[str, ...]


class CellSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A refined cell as a plain value; ratios oldest first."""

    model: str
    gpu: str
    node: str
    shape: Shape
    layout: Layout
    batch: int
    profile_us: int
    mean_us: int
    safe_us: int
    ratios: tuple[float, ...]


class FamilySnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What the cells of a model, GPU kind and node have in common: how they scatter."""

    model: str
    gpu: str
    node: str
    residuals: tuple[float, ...]  # log of measured over believed, oldest first


class LatencySnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a latency model has learned, bounded in size."""

    cells: tuple[CellSnapshot, ...] = ()
    families: tuple[FamilySnapshot, ...] = ()


class Cell:
    """The window of one cell; never empty."""

    __slots__ = ("_believed", "_ordered", "_recent", "ratios")

    def __init__(self, believed: float = 1.0) -> None:
        self._believed = believed
        self._recent: deque[tuple[Group, float]] = deque(maxlen=RECENT)
        self.ratios: tuple[float, ...] = ()  # oldest first
        self._ordered: list[float] = []
        self._fill()

    @classmethod
    def of(cls, ratios: tuple[float, ...]) -> Cell:
        """The cell that had these ratios."""
        if len(ratios) >= WINDOW:
            cell = cls(sorted(ratios)[len(ratios) // 2])
            cell._recent.extend(((), r) for r in ratios)
        else:
            cell = cls(ratios[0] if ratios else 1.0)
            cell._recent.extend(((), r) for r in ratios[2:])
        cell._fill()
        return cell

    @property
    def middle(self) -> float:
        """The median: what the cell is believed to take, over its estimate."""
        return self._ordered[len(self._ordered) // 2]

    @property
    def count(self) -> int:
        """Measurements in the window, about."""
        return len(self._ordered) - 2

    @property
    def settled(self) -> bool:
        """Its middle is its own, no more what was believed before."""
        return len(self._ordered) >= 2 + SETTLED

    def quantile(self, share: float) -> float:
        """Rounded down: never the largest of two or more, unless all are asked for."""
        middle = self.middle
        return max(middle, self._ordered[int(share * (len(self._ordered) - 1))])

    def add(self, group: Group, ratio: float) -> bool:
        """Takes a measurement; whether the window changed by it."""
        self._recent.append((group, ratio))
        before = self.ratios
        ratios = (*before, ratio)[-WINDOW:]
        if ratios == before:
            return False
        self.ratios = ratios
        self._ordered = sorted(ratios)
        return True

    def reference(self, group: Group) -> float | None:
        """What others took: the median of the newest calls of groups that share no worker with
        this one; None where there are too few. What this cell took before is no measure: a slow
        worker's own calls may have made it so.
        """
        others: list[float] = []
        for other, ratio in reversed(self._recent):
            if not any(worker in group for worker in other):
                others.append(ratio)
                if len(others) == PEERS:
                    break
        others.sort()
        return others[(len(others) - 1) // 2] if len(others) >= PEERS_MIN else None

    def disown(self, worker: str) -> bool:
        """Forgets what was measured with a worker; whether there was anything."""
        kept = [(group, ratio) for group, ratio in self._recent if worker not in group]
        if len(kept) == len(self._recent):
            return False
        self._recent = deque(kept, RECENT)
        self._fill()
        return True

    def restart(self, factor: float, since: list[tuple[Group, float]]) -> None:
        """The family moved: what was believed moves with it, and only measurements since count."""
        self._believed = self.middle * factor
        self._recent = deque(since, RECENT)
        self._fill()

    def _fill(self) -> None:
        measured = (ratio for _, ratio in self._recent)
        self.ratios = (self._believed, self._believed, *measured)[-WINDOW:]
        self._ordered = sorted(self.ratios)
