"""What the kernel decided, as starts without workers."""

from __future__ import annotations

from ...books.ledger import Ledger
from ...outlook.standing import next_node
from .binding import Wish
from .filling import BEST_EFFORT
from .kernel import KIND, STEPS_LEFT, Ints
from .roster import Roster


def wanted(ledger: Ledger, roster: Roster, choice: Ints, head: Ints) -> list[Wish]:
    """The kernel's start (see `improve.Start`), in deadline order."""
    chosen, heads = choice.tolist(), head.tolist()
    members: dict[int, list[int]] = {}
    for i in range(len(roster.entries)):
        if chosen[i] >= 0:
            members.setdefault(heads[i], []).append(i)
    wishes: list[Wish] = []
    for first, batch in members.items():
        entry = roster.entries[first]
        tracked = entry.tracked
        node = next_node(ledger, tracked)
        price = roster.prices[int(roster.jobs[first, KIND])]
        took_us = price.of(node, chosen[first])
        if len(batch) > 1:
            took_us = price.batch_us[len(batch) - 1]
        left = min(int(roster.jobs[i, STEPS_LEFT]) for i in batch)
        reason = "on-time" if entry.hopeful else BEST_EFFORT
        width = roster.widths[chosen[first]]
        tracks = [roster.entries[i].tracked for i in batch]
        wishes.append(Wish(tracks, node, width, left, reason, took_us))
    return wishes
