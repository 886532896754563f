"""Best effort on what the decision leaves free, and who of equals goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...books.ledger import Ledger
from ...books.tracker import Tracked
from ...outlook.standing import next_node
from .binding import Wish
from .improve import Limits
from .kernel import AVAIL
from .pods import Pod
from .roster import Roster

BEST_EFFORT = "best-effort"  # reason of a start


class SlowSteps(NamedTuple):
    """What long best-effort steps may take."""

    step_us: int
    reserve: int  # workers that they leave


def fill(
    ledger: Ledger, pod: Pod, roster: Roster, room: int, limits: Limits, slow: SlowSteps
) -> list[Wish]:
    """The hopeless on what is left, in deadline order: as the kernel's own fill."""
    wishes: list[Wish] = []
    alone = not any(e.hopeful for e in roster.entries)
    slow_room = len(pod.workers) - roster.slow - max(roster.need, slow.reserve)
    for entry, price, left in roster.spare:
        if room <= 0:
            break
        node, stepped = next_node(ledger, entry.tracked), entry.tracked.stepped.node
        for width, step_us in zip(roster.widths, price.step_us, strict=True):
            if width > room:
                break
            soon = node != stepped or step_us <= limits.fill_step_us
            long = not soon and step_us <= slow.step_us and width <= slow_room
            if soon or long or (alone and step_us == min(price.step_us)):
                took_us = price.of(node, roster.widths.index(width))
                wishes.append(Wish([entry.tracked], node, width, left, BEST_EFFORT, took_us))
                room -= width
                slow_room -= width if long else 0
                break
    return wishes


def first_come(ledger: Ledger, roster: Roster, wishes: Sequence[Wish], now_us: int) -> None:
    """Of equals, and of those no further from their end, the first come takes the start.

    The hopeless are no equals of those given up who may yet be on time, by what fills let them do.
    """
    single = [w for w in wishes if len(w.members) == 1]
    if not single:
        return
    started = {t.id for w in wishes for t in w.members}
    waiting: dict[tuple[object, ...], list[Tracked]] = {}
    last = max(w.first.order for w in single)  # who came later goes before nobody
    spare = [e for e, *_ in roster.spare if e.tracked.order <= last]
    lost = {e.id for e in spare}

    def key(tracked: Tracked, hopeful: bool) -> tuple[object, ...]:
        r = tracked.request
        node = next_node(ledger, tracked)
        hope = (tracked.promised, hopeful, tracked.id in lost)
        return (r.model, r.shape, r.workflow, r.priority, tracked.alone, hope, node)

    free = zip(roster.entries, roster.jobs[:, AVAIL].tolist(), strict=True)
    for entry in [e for e, us in free if us <= now_us] + spare:
        if entry.tracked.order < last and entry.id not in started:
            waiting.setdefault(key(entry.tracked, entry.hopeful), []).append(entry.tracked)
    for wish in single:
        equals = waiting.get(key(wish.first, wish.reason != BEST_EFFORT), [])
        before = [t for t in equals if _goes_before(t, wish.first)]
        if before:
            first = min(before, key=lambda t: t.order)
            equals[equals.index(first)] = wish.first
            wish.members = [first]


def _goes_before(one: Tracked, other: Tracked) -> bool:
    """It came before, is due no later and has no more left."""
    due, others = one.request.deadline_us, other.request.deadline_us
    return (
        one.order < other.order
        and (others is None or (due is not None and due <= others))
        and one.request.steps - one.steps_done <= other.request.steps - other.steps_done
    )
