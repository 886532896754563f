"""The group knapsack of TetriServe's Algorithm 1: at most one option a request, widths within N.

Literally as printed, the program is indifferent between running and waiting whenever a request
survives either way, and procrastinates (attainment 0.18). Its values here are therefore pairs:
survivals first, progress second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Value = tuple[int, int]  # survivals, progress


class Item(NamedTuple):
    """One option of one request; width 0 is the option to wait."""

    width: int
    value: Value


def pack(groups: Sequence[Sequence[Item]], capacity: int) -> list[int]:
    """Index of the item chosen in each group; the sum of values is the largest that fits.

    dp[c] is the best value with exactly c workers in use. Ties go to fewer workers, then to the
    earlier option. O(groups x options x capacity).
    """
    dp: list[Value | None] = [(0, 0)] + [None] * capacity
    taken: list[list[int]] = []
    for group in groups:
        row: list[Value | None] = [None] * (capacity + 1)
        pick = [-1] * (capacity + 1)
        for index, item in enumerate(group):
            for used in range(item.width, capacity + 1):
                before = dp[used - item.width]
                if before is None:
                    continue
                value = (before[0] + item.value[0], before[1] + item.value[1])
                best = row[used]
                if best is None or value > best:
                    row[used], pick[used] = value, index
        dp = row
        taken.append(pick)
    used = max(
        (c for c in range(capacity + 1) if dp[c] is not None), key=lambda c: (dp[c], -c), default=0
    )
    chosen: list[int] = []
    for group, pick in zip(reversed(groups), reversed(taken), strict=True):
        chosen.append(pick[used])
        used -= group[pick[used]].width
    return chosen[::-1]
