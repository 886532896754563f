"""When requests come: seeded streams of random numbers and the times they give, in seconds.

A stream depends on the workload's name, the seed and what it is for, and on nothing else. So a rate
stretches the same gaps, a deadline changes no arrival, and runs of different settings or policies
meet the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def stream(workload: str, seed: int, name: str) -> random.Random:
    """The stream of this name."""
    return random.Random(f"{workload}/{int(seed)}/{name}")


def pick(rng: random.Random, items: Sequence[T], weights: Sequence[float]) -> T:
    """One item, by weight; takes one number off the stream."""
    x, reached = rng.random() * sum(weights), 0.0
    for item, weight in zip(items, weights, strict=True):
        reached += weight
        if x < reached:
            return item
    return items[-1]


def gaps(rng: random.Random, cv: float) -> Callable[[], float]:
    """Draws gaps of mean 1: exponential for cv 1, else Gamma with this coefficient of variation."""
    if cv == 1.0:
        return lambda: rng.expovariate(1.0)
    if cv == 0.0:
        return lambda: 1.0
    shape = 1.0 / (cv * cv)
    return lambda: rng.gammavariate(shape, 1.0 / shape)


def renewals(rng: random.Random, count: int, per_minute: float, cv: float = 1.0) -> list[float]:
    """So many arrivals one after the other."""
    at, gap = 0.0, gaps(rng, cv)
    found: list[float] = []
    for _ in range(count):
        at += gap() * 60.0 / per_minute
        found.append(at)
    return found


def during(
    rng: random.Random, from_s: float, until_s: float, per_second: float, cv: float = 1.0
) -> list[float]:
    """All arrivals inside a span; the first comes a gap after its beginning."""
    at, gap = from_s, gaps(rng, cv)
    found: list[float] = []
    while True:
        at += gap() / per_second
        if at >= until_s:
            return found
        found.append(at)


class Bursts:
    """A base rate, times `factor` for `length_s` in each `period_s`."""

    def __init__(
        self,
        period_s: float = 120.0,
        start_s: float = 60.0,
        length_s: float = 20.0,
        factor: float = 8,
    ) -> None:
        self._period_s, self._start_s, self._end_s = period_s, start_s, start_s + length_s
        self._factor = factor

    def hot(self, at_s: float) -> bool:
        """Inside a burst."""
        return self._start_s <= at_s % self._period_s < self._end_s

    def arrivals(self, rng: random.Random, count: int, per_minute: float) -> list[float]:
        """A unit-rate Poisson process through the inverse of the cumulative rate: exact."""
        base, at = per_minute / 60.0, 0.0
        found: list[float] = []
        for _ in range(count):
            need = rng.expovariate(1.0)
            while True:
                phase = at % self._period_s
                later = (e for e in (self._start_s, self._end_s, self._period_s) if phase < e)
                edge = at - phase + next(later)
                rate = base * self._factor if self.hot(at) else base
                if rate * (edge - at) >= need:
                    at += need / rate
                    break
                need -= rate * (edge - at)
                at = edge + 1e-9  # so that rounding cannot keep us on this side
            found.append(at)
        return found
