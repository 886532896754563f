"""A day of requests for FLUX.1-dev, pressed into two hours: a daily curve, and bursts.

rate   ▁▁▂▃▄▅▆▇█▇▆▅▄▃▂▁▁   times the burst factor in each burst; drawn by thinning from a Poisson
       0 h              2 h    process, so that all rules meet the same requests of a seed
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from bench.sim.arrivals import pick, stream
from control.scheduler.values import Arrived, Request, Shape

MODEL, STEPS = "flux.1-dev", 28


@dataclass(frozen=True, slots=True)
class PoolDay:
    """What comes in a day. Loads are in workers kept busy, sizes in pixels, times in seconds."""

    length_s: float = 7_200.0
    trough: float = 1.5  # load at night …
    peak: float = 9.0  # … and at noon
    bursts: int = 3
    burst_factor: float = 2.0
    burst_s: float = 180.0
    best_effort: float = 0.2  # part of the requests without a deadline
    sides: tuple[int, ...] = (512, 1024, 2048)
    weights: tuple[float, ...] = (0.40, 0.45, 0.15)
    work_s: tuple[float, ...] = (1.704, 5.8, 28.111)  # on one worker, by the profile
    slo_factor: float = 2.0  # a deadline is so many times the work …
    slo_s: float = 3.0  # … and so much more

    @property
    def mean_work_s(self) -> float:
        """Of a request."""
        return sum(w * s for w, s in zip(self.weights, self.work_s, strict=True))

    def load(self, at_s: float) -> float:
        """Of the daily curve, without bursts."""
        swing = (1 - math.cos(2 * math.pi * at_s / self.length_s)) / 2
        return self.trough + (self.peak - self.trough) * swing


def arrivals(day: PoolDay, seed: int) -> list[Arrived]:
    """The requests of one day, in order."""
    rng = stream("pool-day", seed, "arrivals")
    starts = _bursts(day, stream("pool-day", seed, "bursts"))
    kinds = stream("pool-day", seed, "kinds")
    highest = day.peak * day.burst_factor / day.mean_work_s
    found: list[Arrived] = []
    at_s = 0.0
    while True:
        at_s += rng.expovariate(highest)
        if at_s >= day.length_s:
            return found
        hot = any(start <= at_s < start + day.burst_s for start in starts)
        rate = day.load(at_s) * (day.burst_factor if hot else 1.0) / day.mean_work_s
        if rng.random() * highest < rate:
            found.append(_request(day, kinds, len(found), round(at_s * 1e6)))


def _bursts(day: PoolDay, rng: random.Random) -> list[float]:
    """Starts of bursts: one in each of equal parts of the day, none at its very ends."""
    part = day.length_s / day.bursts
    room = part - day.burst_s
    return [number * part + rng.uniform(0.1, 0.9) * room for number in range(day.bursts)]


def _request(day: PoolDay, rng: random.Random, number: int, at_us: int) -> Arrived:
    index = pick(rng, range(len(day.sides)), day.weights)
    slo_us = round((day.slo_factor * day.work_s[index] + day.slo_s) * 1e6)
    side = day.sides[index]
    request = Request(
        id=f"r{number:06d}",
        model=MODEL,
        shape=Shape(width=side, height=side),
        steps=STEPS,
        deadline_us=None if rng.random() < day.best_effort else at_us + slo_us,
    )
    return Arrived(at_us=at_us, request=request)
