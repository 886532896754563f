"""TetriServe's deadline-aware minimal allocation (section 4.2.1): how many steps how wide.

Of all ways to finish S steps within a budget, the one that costs the least GPU time. The relaxed
problem always mixes at most two degrees, so every degree and every pair is tried: a closed form
each. Cost does not have to rise with the degree, nor time to fall: both are read from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Part(NamedTuple):
    """`steps` steps at `degree` workers."""

    steps: int
    degree: int


def minimal_allocation(
    steps: int, budget_us: int, step_us: Mapping[int, int]
) -> tuple[Part, ...] | None:
    """The cheapest one or two parts that end within the budget, narrower first; None: none.

    Args:
        steps: remaining steps, at least 1.
        budget_us: deadline minus now (the paper's inequality compares a duration with a deadline).
        step_us: step time by degree.
    """
    best: tuple[int, int, tuple[Part, ...]] | None = None
    for parts in _mixes(steps, budget_us, step_us):
        time_us = sum(p.steps * step_us[p.degree] for p in parts)
        cost = sum(p.steps * p.degree * step_us[p.degree] for p in parts)
        key = (cost, time_us, parts)
        if best is None or key < best:
            best = key
    return None if best is None else best[2]


def _mixes(steps: int, budget_us: int, step_us: Mapping[int, int]) -> list[tuple[Part, ...]]:
    degrees = sorted(step_us)
    mixes: list[tuple[Part, ...]] = [
        (Part(steps, k),) for k in degrees if steps * step_us[k] <= budget_us
    ]
    for slow in degrees:
        for fast in degrees:
            gain_us = step_us[slow] - step_us[fast]
            spare_us = budget_us - steps * step_us[fast]
            if gain_us <= 0 or spare_us < 0:
                continue
            slow_steps = min(steps, spare_us // gain_us)
            if 0 < slow_steps < steps:
                pair = (Part(slow_steps, slow), Part(steps - slow_steps, fast))
                mixes.append(tuple(sorted(pair, key=lambda p: p.degree)))
    return mixes
