"""Whole shares of a number: how many workers each pool or each model gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def largest_remainder(weights: Mapping[K, float], total: int) -> dict[K, int]:
    """Shares of `total` in proportion to the weights; what is left goes to the largest remainders.

    Ties go to the larger weight, then to the earlier key. Without any weight all weigh the same.
    """
    known = dict(weights) if sum(weights.values()) > 0 else dict.fromkeys(weights, 1.0)
    each = {key: total * weight / sum(known.values()) for key, weight in known.items()}
    shares = {key: int(exact + 1e-9) for key, exact in each.items()}
    rank = {key: i for i, key in enumerate(known)}
    by_rest = sorted(known, key=lambda k: (round(shares[k] - each[k], 9), -known[k], rank[k]))
    for key in by_rest[: total - sum(shares.values())]:
        shares[key] += 1
    return shares
