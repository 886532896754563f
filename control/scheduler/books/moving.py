"""What it costs a job to go on elsewhere: its latent moves, a group forms for the first time.

Both are told by reports and believed as the median of the last few; before the first one, the
settings say.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..settings import Settings
from ..values import StepsEnded
from .cluster import Cluster

WINDOW = 31  # reports remembered of each kind


@dataclass(slots=True)
class Moving:
    """Prices of moves, in microseconds."""

    settings: Settings
    _change: list[int] = field(default_factory=list)
    _cold: list[int] = field(default_factory=list)
    change_us: int = 0
    cold_us: int = 0

    def __post_init__(self) -> None:
        self.change_us = self.settings.group_change_us
        self.cold_us = self.settings.group_cold_us

    def observe(self, fact: StepsEnded) -> None:
        """Learns from the first report of an assignment."""
        if fact.transfer_time_us:
            self._change = [*self._change, fact.transfer_time_us][-WINDOW:]
            self.change_us = sorted(self._change)[len(self._change) // 2]
        if fact.group_time_us:
            self._cold = [*self._cold, fact.group_time_us][-WINDOW:]
            self.cold_us = sorted(self._cold)[len(self._cold) // 2]

    def cost_us(
        self, cluster: Cluster, before: Collection[str], members: tuple[str, ...], decode: bool
    ) -> int:
        """Setting up a run on `members` of a job that `before` ran; a decode needs one copy."""
        there = members[0] in before if decode else set(before) == set(members)
        cost_us = 0 if there or not before else self.change_us
        if len(members) > 1 and self.cold_us and not cluster.warm(members):
            cost_us += self.cold_us
        return cost_us
