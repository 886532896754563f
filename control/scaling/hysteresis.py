"""The number of workers wanted of one pool, held steady. Pure: time comes as an argument.

    needed   ▁▂▅█▅▂▁▁▁▁▁▁▁▁   out at once; in only when nothing in `quiet_us` needed more,
    wanted   ▁▂▅██████▂▂▁▁▁   the last one only after `idle_us` without a request

Late requests ask for workers beyond what the load explains: more by their share, once in the time
that a worker takes to start. Asked for again sooner, the same requests would count twice.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from control.scaling.need import PoolDemand, by_load, by_queue, forecast
from control.scaling.settings import ScalingSettings

_FEW = 5  # requests with a deadline: fewer tell nothing of their share
_NOTHING = 1e-3  # workers: less than this arrives from nobody


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a pool should have."""

    workers: int  # wanted
    needed: float  # at this moment
    offered: float  # arriving work, in workers that it keeps busy
    late_share: float  # 0 to 1
    reason: str  # "idle", "load", "queue", "late", "quiet", "least" or "most"


@dataclass(slots=True)
class Average:
    """An exponential average of a rate."""

    span_us: int  # its time constant
    seen_us: int  # until so much time was seen, what was not seen counts as nothing
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, amount: float, passed_us: int) -> None:
        """`amount` came in the last `passed_us`."""
        kept = math.exp(-passed_us / self.span_us)
        self._sum = self._sum * kept + amount / self.span_us
        self._weight = self._weight * kept + passed_us / self.span_us

    @property
    def value(self) -> float:
        """Amount per microsecond."""
        return self._sum / max(self._weight, -math.expm1(-self.seen_us / self.span_us))


@dataclass(slots=True)
class PoolScaler:
    """One pool's memory. `step` is called every second or so, with what happened since."""

    settings: ScalingSettings
    _at_us: int | None = None
    _busy_us: int = 0  # when there was a request last
    _raised_us: int = 0  # when late requests last asked for more …
    _raised: float = 0.0  # … workers than these
    _recent: deque[tuple[int, float]] = field(default_factory=deque)  # needs, falling
    _asked: deque[tuple[int, int]] = field(default_factory=deque)  # wanted, where it changed
    _fast: Average = field(init=False)
    _slow: Average = field(init=False)
    _work: Average = field(init=False)
    _decided: Average = field(init=False)
    _missed: Average = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self._fast, self._slow = Average(s.fast_us, s.fast_us), Average(s.slow_us, s.fast_us)
        self._work = Average(s.slow_us, s.fast_us)
        self._decided, self._missed = Average(s.fast_us, s.fast_us), Average(s.fast_us, s.fast_us)

    def step(self, demand: PoolDemand, now_us: int) -> Wanted:
        """What is wanted now; `now_us` never falls."""
        if self._at_us is None:
            self._begin(demand, now_us)
        passed_us = 0 if self._at_us is None else now_us - self._at_us
        self._at_us = now_us
        if demand.due or demand.arrived_us or demand.requests:
            self._busy_us = now_us
        self._fast.add(demand.arrived, passed_us)
        self._slow.add(demand.arrived, passed_us)
        self._work.add(demand.arrived_us, passed_us)
        self._decided.add(demand.decided, passed_us)
        self._missed.add(demand.missed, passed_us)
        offered = self._offered()
        present = self._present(demand.workers, now_us)
        load = by_load(offered, self.settings)
        queue = by_queue(demand.due, offered, present, self.settings)
        share = self._late_share(demand)
        needed, reason = (queue, "queue") if queue > load else (load, "load")
        late = self._by_lateness(demand, needed, share, now_us)
        if late > needed:
            needed, reason = late, "late"
        if demand.waiting and needed < 1:
            needed, reason = 1.0, "queue"
        wanted = self._held(needed, reason, offered, share, now_us)
        if not self._asked or self._asked[-1][1] != wanted.workers:
            self._asked.append((now_us, wanted.workers))
        return wanted

    def _offered(self) -> float:
        """Arriving work, in workers. How many come is averaged over a short time, how much work
        each is over a long one: single large requests are no rise of the load.
        """
        fast, slow = self._fast.value, self._slow.value
        each_us = self._work.value / slow if slow else 0.0
        return forecast(fast, slow, self.settings) * each_us

    def _begin(self, demand: PoolDemand, now_us: int) -> None:
        """What is there is held for the quiet time: whoever asked for it knew more."""
        self._raised_us = now_us - self.settings.start_us
        self._busy_us = now_us if demand.workers else now_us - self.settings.idle_us
        if demand.workers:
            self._recent.append((now_us, float(demand.workers)))

    def _present(self, workers: int, now_us: int) -> float:
        """Workers on average over the next `start_us`: those asked for come one by one."""
        start_us, asked = self.settings.start_us, self._asked
        while len(asked) > 1 and asked[1][0] <= now_us - start_us:
            asked.popleft()
        if not asked or start_us == 0:
            return float(workers)
        newest, total, until_us = asked[-1][1], 0.0, now_us
        for at_us, wanted in reversed(asked):  # what was wanted then is there `start_us` later
            from_us = max(at_us, now_us - start_us)
            total += max(workers, min(wanted, newest)) * (until_us - from_us)
            until_us = from_us
        total += workers * (until_us - (now_us - start_us))
        return total / start_us

    def _late_share(self, demand: PoolDemand) -> float:
        """Of requests of late, and those inside."""
        decided = self._decided.value * self.settings.fast_us + demand.with_deadline
        missed = self._missed.value * self.settings.fast_us + demand.late
        return min(1.0, missed / decided) if decided >= _FEW else 0.0

    def _by_lateness(self, demand: PoolDemand, needed: float, share: float, now_us: int) -> float:
        if share <= self.settings.late_share_max:
            self._raised = 0.0
            return 0.0
        if now_us - self._raised_us >= self.settings.start_us:
            self._raised_us = now_us
            self._raised = max(needed, float(demand.workers)) * (1 + share)
        return self._raised

    def _held(
        self, needed: float, reason: str, offered: float, share: float, now_us: int
    ) -> Wanted:
        s, recent = self.settings, self._recent
        while recent and recent[-1][1] <= needed:
            recent.pop()
        recent.append((now_us, needed))
        while recent[0][0] < now_us - s.quiet_us:
            recent.popleft()
        highest = recent[0][1]
        wanted = math.ceil(highest - _NOTHING)
        if wanted > math.ceil(needed - _NOTHING):
            reason = "quiet"
        if wanted < 1:
            gone = s.to_zero and now_us - self._busy_us >= s.idle_us
            wanted, reason = (0, "idle") if gone else (1, "quiet")
        if wanted < s.workers_min:
            wanted, reason = s.workers_min, "least"
        elif wanted > s.workers_max:
            wanted, reason = s.workers_max, "most"
        return Wanted(wanted, needed, offered, share, reason)
