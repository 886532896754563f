"""Fetches of latents from workers that leave: which are under way, since when, how often tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..values import Fetch

AGAIN_US = 5_000_000  # a fetch that nobody told of by then is tried elsewhere
TRIES_MAX = 4


class Sent(NamedTuple):
    """A fetch under way."""

    fetch: Fetch
    at_us: int
    tries: int

    def is_due(self, now_us: int) -> bool:
        """Whether it is to be tried elsewhere."""
        return now_us >= self.at_us + AGAIN_US


@dataclass(slots=True)
class FetchesUnderWay:
    """The fetches under way, by request."""

    sent: dict[str, Sent] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)  # nobody could take them at the last plan
    waiting: frozenset[str] = frozenset()  # workers that fetch; replaced, never changed

    def next_us(self) -> int | None:
        """When the oldest fetch under way is tried elsewhere."""
        open_ = (s for r, s in self.sent.items() if s.tries < TRIES_MAX and r not in self.stuck)
        return min((s.at_us + AGAIN_US for s in open_), default=None)

    def awaits(self, worker: str) -> bool:
        """A fetch to it is under way: what it holds is news."""
        return worker in self.waiting

    def note(self) -> None:
        """Fetches were added, or have ended."""
        if self.sent or self.waiting:
            self.waiting = frozenset(s.fetch.worker for s in self.sent.values())
