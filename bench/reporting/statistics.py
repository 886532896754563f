"""Means and paired differences over seeds with 95 % intervals, and loads sustained in a sweep.

Intervals are Student's t over seeds (each seed one independent trace): half = t(n - 1) s / sqrt(n).
Policies run the same traces, so differences and ratios are paired by seed. Intervals are per
comparison, not widened for the number of comparisons.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

LEVEL = 0.95
RESAMPLES = 1000
BOOTSTRAP_SEED = 20


class Interval(NamedTuple):
    """A mean with the half width of its interval; `half` is None for fewer than two samples."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


class PolicyVerdict(Enum):
    """How the baseline stands to another policy."""

    AHEAD = "ahead"
    LEVEL = "level"
    BEHIND = "behind"
    UNKNOWN = "one seed"


class Sustained(NamedTuple):
    """A load at which attainment crosses the target; `edge` says when it lies outside the sweep."""

    value: float
    edge: str = ""  # "≥": the target holds over the whole sweep; "<": nowhere in it


class Ratio(NamedTuple):
    """A ratio with the ends of its interval; `edge` "≥" or "≤" when one of the two is censored."""

    value: float
    low: float
    high: float
    edge: str = ""


def mean_interval(samples: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent samples. Raises: ValueError when there are none."""
    n = len(samples)
    if not n:
        raise ValueError("no samples")
    mean = math.fsum(samples) / n
    if n == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((x - mean) ** 2 for x in samples) / (n - 1)
    return Interval(mean, t_quantile(n - 1) * math.sqrt(variance / n), n)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Interval of ours - theirs over the seeds that both have; None when there are none."""
    shared = sorted(ours.keys() & theirs.keys())
    return mean_interval([ours[s] - theirs[s] for s in shared]) if shared else None


def verdict(difference: Interval) -> PolicyVerdict:
    """Ahead or behind where the interval leaves out zero."""
    if difference.half is None:
        return PolicyVerdict.UNKNOWN
    if difference.low > 1e-12:
        return PolicyVerdict.AHEAD
    return PolicyVerdict.BEHIND if difference.high < -1e-12 else PolicyVerdict.LEVEL


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Two-sided quantile of Student's t: P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _t_within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_within(t: float, freedom: int) -> float:
    """P(|T| <= t) as a finite sum (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def sustained(curve: Mapping[float, float], target: float = 0.9) -> Sustained:
    """Highest load up to which a curve of load -> attainment stays at the target or above.

    Linear between the last point that holds and the first that does not; a later recovery does not
    count. Raises: ValueError on an empty curve.
    """
    points = sorted(curve.items())
    if not points:
        raise ValueError("empty curve")
    load, attained = points[0]
    if attained < target:
        return Sustained(load, "<")
    for further, below in points[1:]:
        if below < target:
            return Sustained(load + (further - load) * (attained - target) / (attained - below))
        load, attained = further, below
    return Sustained(load, "≥")


def sustained_ratio(
    ours: Mapping[float, Mapping[int, float]],
    theirs: Mapping[float, Mapping[int, float]],
    target: float = 0.9,
) -> Ratio | None:
    """Our sustained load over theirs (load -> seed -> attainment), with a paired bootstrap.

    Seeds are resampled with a fixed seed, the same ones for both policies. None when the two share
    no point or both are censored.
    """
    loads = sorted(ours.keys() & theirs.keys())
    common = [ours[x].keys() & theirs[x].keys() for x in loads]
    seeds = sorted(set.intersection(*map(set, common))) if common else []
    if not seeds:
        return None

    def of(policy: Mapping[float, Mapping[int, float]], drawn: Sequence[int]) -> Sustained:
        return sustained({x: sum(policy[x][s] for s in drawn) / len(drawn) for x in loads}, target)

    mine, other = of(ours, seeds), of(theirs, seeds)
    if (mine.edge and other.edge) or other.value <= 0 or mine.edge == "<":
        return None
    edge = "≥" if mine.edge == "≥" or other.edge == "<" else "≤" if other.edge == "≥" else ""
    if len(seeds) < 2:
        return Ratio(mine.value / other.value, math.nan, math.nan, edge)
    draws = random.Random(BOOTSTRAP_SEED)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = draws.choices(seeds, k=len(seeds))
        ratios.append(of(ours, drawn).value / of(theirs, drawn).value)
    ratios.sort()
    tail = round((1 - LEVEL) / 2 * RESAMPLES)
    return Ratio(mine.value / other.value, ratios[tail], ratios[-1 - tail], edge)
