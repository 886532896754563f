"""Rules that say how many workers a pool should have.

`signal` is the product's own code (control/scaling). `utilisation` is what a horizontal autoscaler
does with the share of busy workers: it asks for present * share / target, counts workers that
start as idle, leaves differences of less than a tenth alone, and holds what it asked for in the
last five minutes when it goes down. `fixed` never changes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from control.scaling.pools import Outcomes, PoolKey, Pools
from control.scaling.settings import ScalingSettings
from control.scheduler.outlook.demand import PoolWork


@dataclass(frozen=True, slots=True)
class PoolMoment:
    """What a rule may look at, once a second."""

    now_us: int
    work: PoolWork
    outcomes: Outcomes  # of requests with a deadline that ended since the moment before
    workers: int  # asked for and not told to go: those that start, too
    busy: int  # of those, the ones that have work


class PoolRule(Protocol):
    """Says how many workers there should be."""

    def wanted(self, moment: PoolMoment) -> int:
        """Asked once a second; what it says is followed every 15 s."""


@dataclass(slots=True)
class FixedRule:
    """Always as many."""

    workers: int

    def wanted(self, moment: PoolMoment) -> int:
        return self.workers


@dataclass(slots=True)
class SignalRule:
    """The scaling signal of control."""

    settings: ScalingSettings
    _pools: Pools = field(init=False)

    def __post_init__(self) -> None:
        self._pools = Pools(self.settings)

    def wanted(self, moment: PoolMoment) -> int:
        key = PoolKey("m", "g")
        read = self._pools.step({key: moment.work}, {"m": moment.outcomes}, {}, moment.now_us)
        return next(each.wanted.workers for each in read if each.key == key)


@dataclass(slots=True)
class UtilisationRule:
    """A target for the share of busy workers."""

    target: float
    tolerance: float = 0.1
    window_us: int = 60_000_000  # over which the share is averaged
    hold_us: int = 300_000_000
    _shares: deque[tuple[int, float]] = field(default_factory=deque)
    _asked: deque[tuple[int, int]] = field(default_factory=deque)  # falling

    def wanted(self, moment: PoolMoment) -> int:
        now_us, shares, asked = moment.now_us, self._shares, self._asked
        shares.append((now_us, moment.busy / max(1, moment.workers)))
        while shares[0][0] <= now_us - self.window_us:
            shares.popleft()
        ratio = sum(share for _, share in shares) / len(shares) / self.target
        wanted = moment.workers
        if abs(ratio - 1) > self.tolerance:
            wanted = max(1, math.ceil(moment.workers * ratio))
        while asked and asked[-1][1] <= wanted:
            asked.pop()
        asked.append((now_us, wanted))
        while asked[0][0] <= now_us - self.hold_us:
            asked.popleft()
        return asked[0][1]
