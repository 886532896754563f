"""How many workers a pool needs at one moment. Pure.

    load     work that arrives, as it will be when a worker that is asked for now is there,
             over the part of a worker's time that it may take
    queue    that work, and what is inside then, over the time until it is due:

             work due ▲           inside at `start_us`: work(t) + (load - present) * start_us
             until t  │        ╱  needed: load + that / (t - start_us), the most of all t
                      │   ____╱
                      └───┴─────▶ t    t is not before start_us + drain_us: nobody who is asked for
                       start_us        now can help sooner

The larger of the two is needed. The queue is a fluid that all workers share: requests may be split,
moved and paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from control.scaling.settings import ScalingSettings


class Due(NamedTuple):
    """Work that is inside."""

    left_us: int  # until it should be done; negative: it is late
    work_us: int  # what one worker would take for it


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """What is asked of a pool, at one moment."""

    workers: int  # that live and take work
    arrived: float = 0.0  # requests since the moment before; refused as late included …
    arrived_us: int = 0  # … and their work
    due: Sequence[Due] = ()
    requests: int = 0  # inside
    with_deadline: int = 0  # of those, the ones with a deadline …
    late: int = 0  # … and the ones that will miss it, whatever is done
    decided: int = 0  # requests with a deadline that ended, or were refused as late, since then
    missed: int = 0  # of those, the ones not on time
    waiting: int = 0  # inside, for a model that no living worker serves

    @property
    def work_us(self) -> int:
        """Work inside."""
        return sum(each.work_us for each in self.due)


def by_load(offered: float, settings: ScalingSettings) -> float:
    """Workers that keep up with what arrives. `offered`: workers that it keeps busy."""
    return offered / settings.utilisation


def by_queue(
    due: Sequence[Due], offered: float, present: float, settings: ScalingSettings
) -> float:
    """Workers that keep up with what arrives, and have what is inside done when it is due.

    `present`: workers from now on, on average, until one that is asked for now is there.
    """
    grown_us = (offered - present) * settings.start_us
    soonest_us = settings.start_us + settings.drain_us
    needed, inside_us = 0.0, 0
    ordered = sorted(due)
    for number, (left_us, work_us) in enumerate(ordered):
        inside_us += work_us
        is_last = number + 1 == len(ordered)
        if not is_last and ordered[number + 1].left_us <= soonest_us:
            continue
        span_us = max(left_us, soonest_us) - settings.start_us
        needed = max(needed, offered + (inside_us + grown_us) / span_us)
    return needed


def forecast(fast: float, slow: float, settings: ScalingSettings) -> float:
    """The load when a worker that is asked for now is there: it goes on rising as it did.

    A falling load is taken as it is: workers go by the quiet time alone.
    """
    lag_us = settings.slow_us - settings.fast_us  # an average lags by its time constant
    rise = (fast - slow) / lag_us if lag_us > 0 else 0.0
    return fast + max(0.0, rise) * (settings.start_us + settings.fast_us)
