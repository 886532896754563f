"""Starts that keep firm promises: judged once more as they are, before they go out.

The search judges a start by a rollout in which who is held waits for the next end of a run, and
without the best effort that fills the rest. The next plan comes earlier, knows of no such waiting,
and finds the fill running. So starts are played forward as the next plan will find them; where a
promise is lost by that, others are tried, in this order: the same without best effort, those of a
search in which best effort that waited too long has no right of way, the base rule's. The first of
those that lose least is taken, with what its search noted in the pod: each starts from what was
known before the first.

Searches and judging share the pod's budget. Once it is spent nothing more is searched for; what the
first search found is judged all the same, in a few rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...workflow import Section
from .binding import Wish
from .filling import BEST_EFFORT
from .guards import relax
from .improve import Limits
from .kernel import (
    AGED,
    AVAIL,
    FINISH,
    GUARD,
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

LEFT = {Section.BEFORE: TEXT_LEFT, Section.STEPPED: STEPS_LEFT, Section.AFTER: VAE_LEFT}
WAYS = 2  # to look at who is held: free at once, and waiting


class Trouble(NamedTuple):
    """What starts do to firm promises; less is better."""

    lost: int  # promises, in each of the two ways to look at who is held
    relaxed: int  # promises without anything in hand, in the worse of these ways


class Noted(NamedTuple):
    """What a search writes down beside its starts."""

    jobs: Floats  # the roster's; guards that it used up are off
    hopeful: list[bool]  # by entry
    retried: tuple[int, int]  # by the pod

    @classmethod
    def of(cls, pod: Pod, roster: Roster) -> Noted:
        return cls(roster.jobs, [e.hopeful for e in roster.entries], pod.retried)

    def enter(self, pod: Pod, roster: Roster) -> None:
        """As if its search had been the last."""
        roster.jobs = self.jobs.copy()
        pod.retried = self.retried
        for entry, hopeful in zip(roster.entries, self.hopeful, strict=True):
            entry.hopeful = hopeful


class Tried(NamedTuple):
    """Starts, judged, and what the search that found them noted."""

    trouble: Trouble
    wishes: list[Wish]
    noted: Noted


def keep(
    pod: Pod,
    roster: Roster,
    starts: Callable[[Limits], tuple[list[Wish], int]],
    limits: Limits,
    rules: Rules,
    now_us: int,
) -> tuple[list[Wish], int]:
    """Of the starts that a search within some limits finds (with the operations that it took), the
    first with the least trouble; and the operations of all this.
    """
    if not roster.promised:
        return starts(limits)
    before = Noted.of(pod, roster)
    before.enter(pod, roster)
    found, operations = starts(limits)
    if not found:
        return found, operations
    waited = zip(roster.entries, roster.jobs[:, AGED].tolist(), strict=True)
    old = {e.id for e, age in waited if age > 0.0}
    pressing = limits._replace(aged_workers=0)
    judged: list[Tried] = []
    least = 0  # that the first search gave up: no start can keep those
    whole = found
    for tried in (limits, pressing, pressing._replace(passes=0)):
        if judged:
            if operations >= limits.operations_max:
                break
            before.enter(pod, roster)
            whole, used = starts(_left(tried, operations))
            operations += used
        noted = Noted.of(pod, roster)
        searched = _searched(roster, before, noted)
        least = least if judged else searched.lost
        fill = [w for w in whole if w.reason == BEST_EFFORT]
        aged = any(w.first.id in old for w in fill)
        without = [w for w in whole if w not in fill]
        ways = [whole] if aged or not fill else [whole, without]
        for wishes in ways:
            if not wishes and not roster.running:
                continue  # somebody has to start: nothing else would make the next plan
            most = _left(limits, operations).operations_max
            trouble, used = _trouble(pod, roster, wishes, rules, most, now_us)
            operations += used
            told = Trouble(trouble.lost + searched.lost, trouble.relaxed + searched.relaxed)
            if told.lost <= least and not trouble.relaxed:
                return wishes, operations
            judged.append(Tried(told, wishes, noted))
        if not aged and min(t.trouble.lost for t in judged) <= least:
            break
    best = min(judged, key=lambda t: t.trouble)
    best.noted.enter(pod, roster)
    return best.wishes, operations


def _searched(roster: Roster, before: Noted, noted: Noted) -> Trouble:
    """What the search itself did to promises: gave up, and left without anything in hand."""
    given_up = sum(e.tracked.promised and not e.hopeful for e in roster.entries)
    used_up = (before.jobs[:, GUARD] > 0.0) & (noted.jobs[:, GUARD] == 0.0)
    return Trouble(WAYS * given_up, int(used_up.sum()))


def _left(limits: Limits, operations: int) -> Limits:
    """What is left of them after so many operations; a search needs something."""
    return limits._replace(operations_max=max(1_000, limits.operations_max - operations))


def _trouble(
    pod: Pod,
    roster: Roster,
    wishes: Sequence[Wish],
    rules: Rules,
    operations_max: int,
    now_us: int,
) -> tuple[Trouble, int]:
    jobs, on, held = _after(roster, wishes, now_us)
    until = min((us for us in jobs[:, AVAIL].tolist() if us > now_us), default=NEVER)
    ways = [jobs]
    if held and until < NEVER:
        waiting = jobs.copy()
        for i in held:
            waiting[i, AVAIL], waiting[i, WIDTH] = until, 0.0
        ways.append(waiting)
    each = WAYS // len(ways)  # nobody is held: both are the same
    lost = relaxed = operations = 0
    tables = roster.tables()
    for way in ways:
        space = scratch(len(way))
        most = max(0, operations_max - operations)
        more, used = relax(float(now_us), len(pod.workers), way, on, tables, rules, most, space)
        firm = (way[:, WEIGHT] >= PROMISED_WORTH) & (on == 1)
        lost += each * int((firm & (space.floats[FINISH] < 0.0)).sum())
        relaxed = max(relaxed, more)
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
            section = tracked.workflow.section[wish.node]
            left = LEFT[section]
            steps = wish.steps if section is Section.STEPPED else jobs[i, left]
            jobs[i, left] = max(0.0, jobs[i, left] - steps)
    held = [i for i in range(n) if on[i] and i not in started and jobs[i, AVAIL] <= now_us]
    return jobs, on, held
