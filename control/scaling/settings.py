"""Bounds and time constants of the scaling signal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """All times in microseconds."""

    workers_min: int = 0  # of a pool
    workers_max: int = 1_000
    utilisation: float = 0.8  # part of a worker's time that arriving work may take: 0 to 1
    start_us: int = 60_000_000  # from the wish for a worker to its first step
    drain_us: int = 30_000_000  # a queue is to be gone so long after new workers are there
    quiet_us: int = 180_000_000  # workers go only when they were not needed for so long
    idle_us: int = 900_000_000  # the last one goes after so long without any request
    late_share_max: float = 0.02  # more late requests than this call for workers
    fast_us: int = 90_000_000  # time constants of averages of arrivals: short …
    slow_us: int = 600_000_000  # … and long; their difference says where the load goes
    to_zero: bool = False  # the last worker may go: requests wake the model
