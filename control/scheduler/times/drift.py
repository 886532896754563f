"""How the cells of a family scatter, and whether the whole family has moved for good.

A family is a model's node on a kind of GPU. Each measurement leaves a residual: the log of what it
took over what its cell was believed to take. Their spread judges what is unusual, their upper tail
is lent to cells with few measurements of their own, and their sum tells of drift: CUSUM (Page 1954)
on the likelihood ratio of a shift, upwards and downwards.

        sum ▲                       ╭─ LIMIT: the family has moved
            │              ╭──╮  ╭──╯
            ┼──╮  ╭────────╯  ╰──╯
            └──┴──┴───────────────────▶ measurements; no single one adds more than a third

One slow worker is no drift (`stragglers.py`): while all evidence comes from groups that have a
worker in common, thrice as much is wanted.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from .profile import CellKey

RESIDUALS = 128  # kept a family
ENOUGH = 8  # residuals that tell of spread
SPREAD_UNKNOWN = 0.1
SPREAD_MIN = 0.03
MAD = 1.4826  # median absolute deviation to standard deviation, and the same for a 0.9-quantile:
TAIL = 1.2816
TAIL_GRID = 0.005  # of the lent quantile, so that not every measurement changes all cells
SHIFT_MIN = 0.14  # the least shift worth telling, of a log; 15 %
SPEAKS = 0.8  # part of a shift that a residual has to show to count as evidence of whose it is
LIMIT = 12.0  # of the log likelihood ratio
SINCE_MAX = 64  # measurements kept while there is doubt
WORKERS_MAX = 4096  # remembered to have been at work

Group = tuple[str, ...]


class Sample(NamedTuple):
    """One measurement beside what others took: log of the quotient, and the usual spread of it."""

    excess: float
    spread: float


class Shift(NamedTuple):
    """A family takes `factor` times what it took before."""

    family: tuple[str, str, str]  # model, gpu, node
    factor: float


class FamilyState:
    """Residuals of one family and the doubt about a shift."""

    def __init__(self, residuals: Sequence[float] = ()) -> None:
        self._residuals = array("d", residuals[-RESIDUALS:])  # oldest first
        self._uneven = any(self._residuals)
        self._spread: float | None = None
        self._tails: dict[float, float] = {}
        self._up = self._down = 0.0
        self._since: deque[tuple[CellKey, float, Group]] = deque(maxlen=SINCE_MAX)
        self._moved: deque[float] = deque(maxlen=SINCE_MAX)  # their residuals
        self._common: frozenset[str] | None = None  # workers in all groups since
        self._workers: set[str] = set()

    @property
    def residuals(self) -> tuple[float, ...]:
        return tuple(self._residuals)

    @property
    def known(self) -> bool:
        """There are residuals enough to lend their tail to a cell."""
        return len(self._residuals) >= ENOUGH

    @property
    def spread(self) -> float:
        """Standard deviation of a residual, as far as outliers let it be known."""
        if not self.known:
            return SPREAD_UNKNOWN
        if self._spread is None:
            ordered = sorted(self._residuals)
            middle = ordered[len(ordered) // 2]
            deviations = sorted(abs(r - middle) for r in ordered)
            above = ordered[int(0.9 * (len(ordered) - 1))] - middle
            usual = max(MAD * deviations[len(deviations) // 2], above / TAIL)
            self._spread = max(SPREAD_MIN, usual)
        return self._spread

    def tail(self, share: float) -> float:
        """That quantile of the residuals, at least 0; 0 while nothing is known."""
        if not self._uneven or not self.known:
            return 0.0
        tail = self._tails.get(share)
        if tail is None:
            ordered = sorted(self._residuals)
            at = ordered[int(share * (len(ordered) - 1))]
            tail = self._tails[share] = max(0.0, round(at / TAIL_GRID) * TAIL_GRID)
        return tail

    def observe(self, residual: float, key: CellKey, ratio: float, group: Group) -> Shift | None:
        """Enters a residual; returns the shift once there is no more doubt."""
        doubt = self._doubt(residual, key, ratio, group)
        self._residuals.append(residual)
        if len(self._residuals) > RESIDUALS:
            del self._residuals[0]
        self._uneven = self._uneven or residual != 0.0
        if self._uneven:
            self._spread = None
            self._tails.clear()
        if len(self._workers) > WORKERS_MAX:
            self._workers.clear()
        self._workers.update(group)
        if doubt <= self._limit():
            return None
        moved = sorted(self._moved)
        return Shift(key[:3], math.exp(moved[len(moved) // 2]))

    def settle(self) -> list[tuple[CellKey, float, Group]]:
        """The shift is accounted for; returns the measurements since it began."""
        since = list(self._since)
        moved = set(self._moved)
        kept = [r for r in self._residuals if r not in moved]  # these tell of the shift, not spread
        self._residuals = array("d", kept)
        self._uneven = any(kept)
        self._spread = None
        self._tails.clear()
        self._up = self._down = 0.0
        self._clear()
        return since

    def _doubt(self, residual: float, key: CellKey, ratio: float, group: Group) -> float:
        shift = max(SHIFT_MIN, 1.5 * self.spread)
        scale = shift / self.spread**2
        was = max(self._up, self._down)
        up_higher = self._up >= self._down
        self._up = max(0.0, self._up + _clipped(scale * (residual - shift / 2)))
        self._down = max(0.0, self._down + _clipped(scale * (-residual - shift / 2)))
        doubt = max(self._up, self._down)
        if was == 0.0 or doubt == 0.0 or up_higher != (self._up >= self._down):
            self._clear()
        if doubt > 0.0:
            self._since.append((key, ratio, group))
            self._moved.append(residual)
            if (residual if self._up >= self._down else -residual) > SPEAKS * shift:
                common = self._common
                self._common = frozenset(group) if common is None else common & {*group}
        return doubt

    def _limit(self) -> float:
        """One worker in common explains it as well, unless there never was another."""
        return 3 * LIMIT if self._common and len(self._workers) > 1 else LIMIT

    def _clear(self) -> None:
        self._since.clear()
        self._moved.clear()
        self._common = None


def _clipped(evidence: float) -> float:
    return min(LIMIT / 3 + 0.01, max(-LIMIT / 3, evidence))
