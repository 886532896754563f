"""Starts that keep firm promises: judged once more as they are, before they go out.

The search judges a start by a rollout in which who is held waits for the next end of a run, and
without the best effort that fills the rest. The next plan comes earlier, knows of no such waiting,
and finds the fill running. So starts are played forward as the next plan will find them; where a
promise is lost by that, others are tried, in this order: the same without best effort, those of a
search in which best effort that waited too long has no right of way, the base rule's. The first of
those that lose least is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...values import DIT, TEXT, VAE
from .binding import Wish
from .filling import BEST_EFFORT
from .improve import Limits
from .kernel import (
    AGED,
    AVAIL,
    FINISH,
    NEVER,
    PROMISED_WORTH,
    STEPS_LEFT,
    TEXT_LEFT,
    VAE_LEFT,
    WEIGHT,
    WIDTH,
    Floats,
    Ints,
    Rules,
    scratch,
)
from .pods import Pod
from .roster import Roster
from .search import relax


class Trouble(NamedTuple):
    """What starts do to firm promises; less is better."""

    lost: int  # promises, in both ways to look at who is held
    relaxed: int  # promises without anything in hand


def keep(
    pod: Pod,
    roster: Roster,
    starts: Callable[[Limits], list[Wish]],
    limits: Limits,
    rules: Rules,
    now_us: int,
) -> tuple[list[Wish], int]:
    """Of the starts that a search within some limits finds, the first with the least trouble; and
    the operations that judging them took.
    """
    found = starts(limits)
    if not roster.promised or not found:
        return found, 0
    waited = zip(roster.entries, roster.jobs[:, AGED].tolist(), strict=True)
    old = {e.id for e, age in waited if age > 0.0}
    pressing = limits._replace(aged_workers=0)
    judged: list[tuple[Trouble, list[Wish]]] = []
    operations = 0
    for tried in (limits, pressing, pressing._replace(passes=0)):
        whole = starts(tried) if judged else found
        fill = [w for w in whole if w.reason == BEST_EFFORT]
        aged = any(w.first.id in old for w in fill)
        without = [w for w in whole if w not in fill]
        ways = [whole] if aged or not fill else [whole, without]
        for wishes in ways:
            if not wishes and not roster.running:
                continue  # somebody has to start: nothing else would make the next plan
            trouble, used = _trouble(pod, roster, wishes, rules, now_us)
            operations += used
            judged.append((trouble, wishes))
            if trouble == (0, 0):
                return wishes, operations
        if not aged and min(trouble.lost for trouble, _ in judged) == 0:
            break
    return min(judged, key=lambda t: t[0])[1], operations


def _trouble(
    pod: Pod, roster: Roster, wishes: Sequence[Wish], rules: Rules, now_us: int
) -> tuple[Trouble, int]:
    jobs, on, held = _after(roster, wishes, now_us)
    until = min((us for us in jobs[:, AVAIL].tolist() if us > now_us), default=NEVER)
    ways = [jobs]
    if held and until < NEVER:
        waiting = jobs.copy()
        for i in held:
            waiting[i, AVAIL], waiting[i, WIDTH] = until, 0.0
        ways.append(waiting)
    lost = relaxed = operations = 0
    tables = roster.tables()
    for way in ways:
        space = scratch(len(way))
        more, used = relax(float(now_us), len(pod.workers), way, on, tables, rules, space)
        firm = (way[:, WEIGHT] >= PROMISED_WORTH) & (on == 1)
        lost += int((firm & (space.floats[FINISH] < 0.0)).sum())
        relaxed += more
        operations += used
    return Trouble(lost, relaxed), operations


def _after(roster: Roster, wishes: Sequence[Wish], now_us: int) -> tuple[Floats, Ints, list[int]]:
    """Jobs once these starts are made, who of them counts, and who is held."""
    rank = {e.id: i for i, e in enumerate(roster.entries)}
    more = sum(t.id not in rank for w in wishes for t in w.members)
    n = len(rank)
    jobs = np.vstack([roster.jobs, np.zeros((more, roster.jobs.shape[1]))])
    on = np.zeros(n + more, np.int64)
    on[:n] = [e.hopeful for e in roster.entries]
    started: set[int] = set()
    for wish in wishes:
        for place, tracked in enumerate(wish.members):
            i = rank.get(tracked.id, n + more - 1)
            more -= tracked.id not in rank
            started.add(i)
            jobs[i, WIDTH] = 0 if place else wish.width
            jobs[i, AVAIL] = now_us + wish.took_us * wish.steps
            left = {TEXT: TEXT_LEFT, DIT: STEPS_LEFT, VAE: VAE_LEFT}[wish.node]
            jobs[i, left] = max(0.0, jobs[i, left] - wish.steps) if wish.node == DIT else 0.0
    held = [i for i in range(n) if on[i] and i not in started and jobs[i, AVAIL] <= now_us]
    return jobs, on, held
