"""Who waits for which request: followers, their lines, and the grace to come back.

Pure bookkeeping, like workers/leases.py: words of gateways and the time go in, requests that nobody
waits for come out. A follower belongs to one line (a gateway's stream). When the line ends, or the
follower is told to come back, its grace begins; it may return by any line, under its name or as
another follower of the same request.

    follow ─▶ here ── leaves (gave up) ─────────────▶ gone
                └── line ends, leaves (returns) ─▶ away ── grace is over ─▶ gone

Onlookers hear everything and keep nothing from being cancelled.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

FOLLOWERS_MAX = 200_000


@dataclass(slots=True)
class _Follower:
    request: str
    line: Hashable | None  # None: away
    onlooker: bool
    gone_us: int = 0  # when its grace ends, while it is away


class Followers:
    """All followers of open requests."""

    def __init__(self, grace_us: int) -> None:
        self._grace_us = grace_us
        self._followers: dict[str, _Follower] = {}
        self._of_request: dict[str, set[str]] = {}
        self._of_line: dict[Hashable, set[str]] = {}
        self._ends: list[tuple[int, str]] = []  # heap of (gone_us, follower)
        self._unnamed = itertools.count()

    @property
    def count(self) -> int:
        return len(self._followers)

    def is_full(self) -> bool:
        return len(self._followers) >= FOLLOWERS_MAX

    def follow(
        self, follower: str, request: str, line: Hashable, *, onlooker: bool = False
    ) -> None:
        """It is here, by this line; wherever it was before, it is there no longer."""
        self._drop(follower)
        self._followers[follower] = _Follower(request, line, onlooker)
        self._of_request.setdefault(request, set()).add(follower)
        self._of_line.setdefault(line, set()).add(follower)

    def expect(self, request: str, now_us: int) -> None:
        """Somebody unknown followed it under an earlier leader, and has the grace to come back."""
        name = f"?{next(self._unnamed)}"
        self._followers[name] = _Follower(request, None, onlooker=False)
        self._of_request.setdefault(request, set()).add(name)
        self._send_away(name, now_us)

    def leave(
        self, follower: str, line: Hashable, now_us: int, *, returns: bool
    ) -> tuple[str, ...]:
        """It leaves this line; a word from a line that it no longer is on says nothing.

        Returns the request, where nobody waits for it any more.
        """
        known = self._followers.get(follower)
        if known is None or known.line != line:
            return ()
        if returns and not known.onlooker:
            self._send_away(follower, now_us)
            return ()
        self._drop(follower)
        return self._unfollowed(known)

    def lost(self, line: Hashable, now_us: int) -> None:
        """A line ended: its followers have the grace to come back, by any line."""
        for follower in sorted(self._of_line.pop(line, ())):
            if self._followers[follower].onlooker:
                self._drop(follower)
            else:
                self._send_away(follower, now_us)

    def expire(self, now_us: int) -> tuple[str, ...]:
        """Ends each grace that is over; returns the requests that nobody waits for any more."""
        found: list[str] = []
        while self._ends and self._ends[0][0] <= now_us:
            gone_us, follower = heapq.heappop(self._ends)
            known = self._followers.get(follower)
            if known is None or known.line is not None or known.gone_us != gone_us:
                continue  # it came back, or its request ended
            self._drop(follower)
            found += self._unfollowed(known)
        return tuple(found)

    def next_expiry_us(self) -> int | None:
        return self._ends[0][0] if self._ends else None

    def lines_of(self, request: str) -> Iterable[Hashable]:
        """Lines on which somebody follows the request, each once."""
        named = (self._followers[f].line for f in self._of_request.get(request, ()))
        return dict.fromkeys(line for line in named if line is not None)

    def is_followed(self, request: str) -> bool:
        """Whether somebody waits for it, here or on the way back."""
        return any(not self._followers[f].onlooker for f in self._of_request.get(request, ()))

    def ended(self, request: str) -> None:
        """The request has ended: its followers have nothing left to hear."""
        for follower in tuple(self._of_request.get(request, ())):
            self._drop(follower)

    def _unfollowed(self, known: _Follower) -> tuple[str, ...]:
        if known.onlooker or self.is_followed(known.request):
            return ()
        return (known.request,)

    def _send_away(self, follower: str, now_us: int) -> None:
        known = self._followers[follower]
        self._off_line(follower, known)
        known.line, known.gone_us = None, now_us + self._grace_us
        heapq.heappush(self._ends, (known.gone_us, follower))

    def _drop(self, follower: str) -> None:
        known = self._followers.pop(follower, None)
        if known is None:
            return
        self._off_line(follower, known)
        others = self._of_request[known.request]
        others.discard(follower)
        if not others:
            del self._of_request[known.request]

    def _off_line(self, follower: str, known: _Follower) -> None:
        here = self._of_line.get(known.line)
        if here is not None:
            here.discard(follower)
            if not here:
                del self._of_line[known.line]
