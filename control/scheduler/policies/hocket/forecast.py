"""When would newcomers be done? Rollouts of their pods with them inside.

Not an estimate of a queue: the same future that the planner judges its own starts by, at safe step
times. A newcomer is late where it would be late itself, or where somebody would be whom a firm
promise was made: the planner would give the newcomer up. Questions change nothing.

Newcomers of one instant share rollouts. They go in in growing blocks; where one does not fit,
halving finds the first in it who is late, and whoever asks for at least as much in at most as much
time is late as well.

    a | b | c d | e f g h    h? no ─▶ e f? yes ─▶ g? no: g is late, and with it its like

A firm promise keeps the planner from serving newcomers instead, so it is made only where that is
worth it: the pod's last arrivals come once more, and a promise that would cost more of them their
deadline than it keeps is refused (*echoes*). Without it long videos promised early cost short ones
their place: 77 instead of 83 % on time where GENSERVE's balanced mix overloads eight workers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...books.ledger import Ledger
from ...values import Request
from ..base import NOBODY, Newcomer
from .guards import relax
from .improve import Limits
from .kernel import (
    COLUMNS,
    DEADLINE,
    FINISH,
    GUARD,
    PROMISED_WORTH,
    STEPS_LEFT,
    WEIGHT,
    Floats,
    Ints,
    Rules,
    rollout,
    scratch,
)
from .pods import Pod, Pods, work_us
from .roster import Roster, RosterMaker
from .search import give_up

GROWTH = 0.5  # newcomers that go in together, of those taken in before
FAR_US = 1e15  # the deadline of who has none


LATE = Newcomer(None, late=True)


@dataclass(slots=True)
class _Guest:
    """A newcomer as a row of its pod; one that is inside already, but that no plan has seen."""

    request: Request
    row: Floats
    promised: bool  # firmly, before
    answer: Newcomer = LATE


@dataclass(slots=True)
class _Future:
    """One pod, with those newcomers that it takes in."""

    pod: Pod
    roster: Roster
    guests: list[_Guest] = field(default_factory=list)
    taken: list[_Guest] = field(default_factory=list)
    work_us: int = 0
    # Rows of the roster whose promise is not kept without newcomers either.
    lost: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    operations: int = 0
    before: int = 0  # of these, what holding promises to their deadlines took


class Forecaster:
    """Forecasts from one state of the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        pods: Pods,
        maker: RosterMaker,
        rules: Rules,
        limits: Limits,
        echo_loss: float,
        now_us: int,
    ) -> None:
        self._ledger = ledger
        self._pods = pods
        self._maker = maker
        self._rules = rules
        self._limits = limits
        self._echo_loss = echo_loss
        self._now_us = now_us
        self._futures: dict[int, _Future] = {}
        self._queues: dict[str, list[tuple[int, int]]] = {}  # by model: pods by their work
        self._worth: dict[tuple[object, ...], bool] = {}

    def ask(self, unseen: Iterable[Request], requests: Sequence[Request]) -> list[Newcomer]:
        """Answers for newcomers of one instant, each behind those before it, and all behind the
        requests inside that no plan has seen yet.
        """
        for request in unseen:
            self._place(request, promised=self._ledger.tracked[request.id].promised)
        guests = [self._place(request, promised=False) for request in requests]
        for future in self._futures.values():
            self._settle(future)
        return [NOBODY if guest is None else guest.answer for guest in guests]

    @property
    def operations(self) -> int:
        """Of the kernel, in all."""
        return sum(future.operations for future in self._futures.values())

    # ------------------------------------------------------------------------------ who goes where

    def _place(self, request: Request, promised: bool) -> _Guest | None:
        """In the pod that it would join."""
        pod = self._best(request.model)
        if pod is None:
            return None
        future = self._future(pod)
        row = self._row(future, request, self._now_us, request.deadline_us)
        row[WEIGHT] += PROMISED_WORTH * promised
        guest = _Guest(request, row, promised)
        future.guests.append(guest)
        future.work_us += work_us(self._ledger, request)
        return guest

    def _best(self, model: str) -> Pod | None:
        """As the pods themselves choose, with the newcomers before it in them."""
        pods = self._pods.pods
        queue = self._queues.get(model)
        if queue is None:
            queue = [(self._load_us(p), p.index) for p in pods if p.can(model)]
            heapq.heapify(queue)
            self._queues[model] = queue
        while queue and queue[0][0] != self._load_us(pods[queue[0][1]]):
            heapq.heapreplace(queue, (self._load_us(pods[queue[0][1]]), queue[0][1]))
        return pods[queue[0][1]] if queue else None

    def _load_us(self, pod: Pod) -> int:
        future = self._futures.get(pod.index)
        return (pod.work_us + (0 if future is None else future.work_us)) // len(pod.workers)

    def _future(self, pod: Pod) -> _Future:
        known = self._futures.get(pod.index)
        if known is None:
            roster = self._maker.make(self._ledger, pod, self._now_us, look=True)
            known = self._futures[pod.index] = _Future(pod, roster)
        return known

    def _row(
        self, future: _Future, request: Request, begin_us: int, deadline_us: int | None
    ) -> Floats:
        roster = future.roster
        kind = (request.model, request.shape, request.workflow, "")
        if kind not in roster.kinds:
            roster.kinds.append(kind)
            roster.prices.append(
                self._maker.price(self._ledger, future.pod, roster.widths, request)
            )
        number = roster.kinds.index(kind)
        price = roster.prices[number]
        guard_us = self._maker.guard_us(request, begin_us)
        due_us = FAR_US if deadline_us is None else float(deadline_us - guard_us)
        worth = self._maker.worth(request)
        row = np.zeros(COLUMNS)
        row[:4] = number, price.before_us, request.steps, price.after_us
        row[4:8] = due_us, begin_us, 0.0, worth
        row[GUARD] = guard_us
        return row

    # ------------------------------------------------------------------------------ who fits

    def _settle(self, future: _Future) -> None:
        """Answers for all guests of a pod, in order."""
        left = list(future.guests)
        roster = future.roster
        future.lost = np.zeros(len(roster.entries), np.int64)
        if roster.promised:
            future.lost = self._lost_without(future)
        while left:
            if future.operations - future.before > self._limits.operations_max:
                self._all_at_once(future, left)
                return
            block = left[: max(1, int(GROWTH * len(future.taken)))]
            size = self._fitting(future, block)
            future.taken += left[:size]
            left = left[size:]
            if size < len(block):
                late = left.pop(0)
                late.answer = LATE
                left = [g for g in left if not self._as_late(g, late)]

    def _lost_without(self, future: _Future) -> Ints:
        """Whose promises are not kept without newcomers either. Whose guard is used up already is
        held to its deadline, as the planner does: no newcomer may cost it that.
        """
        roster = future.roster
        on = _flags([e.hopeful or e.tracked.promised for e in roster.entries])
        space = scratch(len(on))
        gpus, tables, now = len(future.pod.workers), roster.tables(), float(self._now_us)
        most = self._limits.operations_max
        _, used = relax(now, gpus, roster.jobs, on, tables, self._rules, most, space)
        future.operations += used
        future.before = used
        _, finish = self._together(future, [])
        return _broken(roster.jobs, finish).astype(np.int64)

    def _all_at_once(self, future: _Future, guests: list[_Guest]) -> None:
        """One answer for all that are left, once what a forecast may cost is spent."""
        rows, finish = self._together(future, guests)
        first = len(rows) - len(guests)
        lost = self._costs(future, rows, finish)
        for guest, finish_us in zip(guests, finish[first:].tolist(), strict=True):
            guest.answer = LATE if lost or finish_us <= 0 else Newcomer(int(finish_us), late=False)

    def _as_late(self, guest: _Guest, late: _Guest) -> bool:
        """It asks for as much or more, in as much time or less."""
        a, b = guest.row, late.row
        return bool(
            a[0] == b[0]
            and a[STEPS_LEFT] >= b[STEPS_LEFT]
            and a[DEADLINE] <= b[DEADLINE]
            and a[WEIGHT] <= b[WEIGHT]
            and guest.request.firm >= late.request.firm
            and not guest.promised
        )

    def _fitting(self, future: _Future, guests: list[_Guest]) -> int:
        """How many of these, from the first on, go in together; enters their answers."""
        low, high, size = 0, len(guests), len(guests)
        while low < high:
            answers = self._fits(future, guests[:size])
            if answers is None:
                high = size - 1
            else:
                low = size
                for guest, answer in zip(guests[:size], answers, strict=True):
                    guest.answer = answer
            size = (low + high + 1) // 2
        return low

    def _fits(self, future: _Future, more: list[_Guest]) -> list[Newcomer] | None:
        """Finishes of all guests taken in and of some more; None if one of these is late, or makes
        somebody late whom a firm promise was made.
        """
        for guest in more:
            if not guest.promised and guest.request.firm and not self._worth_it(future, guest):
                return None
        rows, finish = self._together(future, more)
        if self._costs(future, rows, finish):
            return None
        first = len(rows) - len(more)
        if (finish[first:] <= 0.0).any():
            return None
        return [Newcomer(us, late=False) for us in finish[first:].astype(int).tolist()]

    def _together(self, future: _Future, more: list[_Guest]) -> tuple[Floats, Floats]:
        """Rows and finishes of all in the pod, of the guests taken in and of some more."""
        entries, inside = future.roster.entries, [*future.taken, *more]
        rows = np.vstack([future.roster.jobs, *(g.row for g in inside)])
        on = _flags([e.hopeful or e.tracked.promised for e in entries] + [True] * len(inside))
        order = np.argsort(rows[:, DEADLINE], kind="stable")
        finish = np.empty(len(rows))
        finish[order] = self._play(future, rows[order], on[order])
        return rows, finish

    def _play(self, future: _Future, jobs: Floats, on: Ints) -> Floats:
        """Finish of each; negative: late."""
        space = scratch(len(jobs))
        gpus, tables = len(future.pod.workers), future.roster.tables()
        _, used = rollout(float(self._now_us), gpus, jobs, on, tables, self._rules, space)
        future.operations += used
        finish: Floats = space.floats[FINISH]
        return finish

    def _costs(self, future: _Future, rows: Floats, finish: Floats) -> bool:
        """Somebody's promise is not kept that is without newcomers."""
        broken = _broken(rows, finish)
        broken[: len(future.lost)] &= future.lost == 0
        return bool(broken.any())

    # ------------------------------------------------------------------------------ what it costs

    def _worth_it(self, future: _Future, guest: _Guest) -> bool:
        """Its promise costs no more than `echo_loss` of those who come next, if they are like those
        who came last. One answer for all of a kind in a burst.
        """
        request = guest.request
        kind = (request.model, request.shape, request.steps, request.workflow)
        key = (future.pod.index, kind, request.priority)
        known = self._worth.get(key)
        if known is None:
            known = self._worth[key] = self._echo(future, guest)
        return known

    def _echo(self, future: _Future, guest: _Guest) -> bool:
        deadline_us = guest.request.deadline_us
        if self._echo_loss < 0 or deadline_us is None:
            return True
        span_us = deadline_us - self._now_us
        echoes = [
            self._row(future, past, arrived_us + span_us, past.deadline_us + span_us)
            for arrived_us, past in future.pod.arrivals
            if past.workflow in self._ledger.catalogue.views  # else forgotten
            if past.deadline_us is not None and 0 <= self._now_us - arrived_us < span_us
        ]
        if not echoes:
            return True
        roster = future.roster
        there = [g.row for g in future.taken]
        without = self._value(future, [*there, *echoes])
        row = guest.row.copy()
        row[WEIGHT] += PROMISED_WORTH
        value = self._value(future, [*there, row, *echoes]) - PROMISED_WORTH
        assert len(roster.kinds) == len(roster.prices)
        return value >= without - self._echo_loss

    def _value(self, future: _Future, more: list[Floats]) -> float:
        """What is on time in all, once the rest is given up."""
        entries = future.roster.entries
        rows = np.vstack([future.roster.jobs, *more])
        on = _flags([e.hopeful or e.tracked.promised for e in entries] + [True] * len(more))
        order = np.argsort(rows[:, DEADLINE], kind="stable")
        jobs, on = np.ascontiguousarray(rows[order]), on[order]
        gpus, tables, now = len(future.pod.workers), future.roster.tables(), float(self._now_us)
        space = scratch(len(jobs))
        future.operations += give_up(now, gpus, jobs, on, tables, self._rules, self._limits, space)
        return float((jobs[:, WEIGHT] * on).sum())


def _broken(jobs: Floats, finish: Floats) -> NDArray[np.bool_]:
    return (jobs[:, WEIGHT] >= PROMISED_WORTH) & (finish < 0.0)


def _flags(on: list[bool]) -> Ints:
    return np.array(on, np.int64)
