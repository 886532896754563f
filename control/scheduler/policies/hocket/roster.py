"""A pod as the kernel sees it: prices by kind, a matrix of jobs, what moves cost.

Times are microseconds on the control plane's clock, as floats: exact up to 2^53.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...books.ledger import Ledger
from ...values import Request, Shape
from ...workflow import Degrees
from .kernel import (
    AGED,
    AVAIL,
    COLUMNS,
    DEADLINE,
    EPS,
    GUARD,
    KIND,
    NEVER,
    PROMISED_WORTH,
    STEPS_LEFT,
    TEXT_LEFT,
    VAE_LEFT,
    WIDTH,
    Floats,
    Tables,
)
from .pods import Entry, Pod, flight_end_us

BATCHES_SAVE = 0.7  # of what a job costs alone
Kind = tuple[str, Shape, str, str]  # with the workflow; last: of who shares no batch, its id
_WORTH_LEAST = 0.01
NEEDS_MAX = 256  # arrivals that tell what a newcomer may need


@dataclass(frozen=True, slots=True)
class Prices:
    """Call times of one kind in a pod."""

    once_us: Mapping[str, int]  # by node that is called once
    before_us: int  # of those before the steps, along their critical path
    after_us: int
    step_us: tuple[float, ...]  # by index of width; NEVER where it cannot
    batch_us: tuple[float, ...]  # of 1, 2, ... jobs at degree 1
    fastest_us: float = field(init=False)  # of the steps

    def __post_init__(self) -> None:
        object.__setattr__(self, "fastest_us", min(self.step_us))

    def of(self, node: str, width: int) -> float:
        """One call of a node; `width`: index of the width of a step."""
        once_us = self.once_us.get(node)
        return self.step_us[width] if once_us is None else once_us

    @property
    def batches_save(self) -> bool:
        """A job costs much less in some batch."""
        alone_us = BATCHES_SAVE * self.batch_us[0]
        return any(us <= n * alone_us for n, us in enumerate(self.batch_us, 1))


class Guard(NamedTuple):
    """What is kept in hand of the time that a firm promise gives."""

    part: float
    us_max: int


class Patience(NamedTuple):
    """When best effort goes first."""

    idle_us: int  # without progress
    wait_us: int  # in all, beside its own time; 0: never
    slowdown: float  # and at least so many times its own time
    places: int  # for so many at a time

    def age(self, idle_us: int, waited_us: float, own_us: float) -> float:
        """How many times over it has waited too long; 0: not yet."""
        age = idle_us / max(1, self.idle_us) if idle_us > self.idle_us else 0.0
        bound_us = max(self.wait_us, self.slowdown * own_us)
        if self.wait_us and waited_us >= bound_us:
            age = max(age, waited_us / bound_us)
        return age

    def lasts(self, idle_us: int, waited_us: int) -> bool:
        """Nobody's age can be more than zero yet; `waited_us`: at most."""
        return idle_us <= self.idle_us and (not self.wait_us or waited_us < self.wait_us)


@dataclass(slots=True)
class Roster:
    """One pod at one instant."""

    entries: list[Entry] = field(default_factory=list)
    jobs: Floats = field(default_factory=lambda: np.zeros((0, COLUMNS)))
    kinds: list[Kind] = field(default_factory=list)
    prices: list[Prices] = field(default_factory=list)
    widths: tuple[int, ...] = ()
    free: dict[str, int] = field(default_factory=dict)  # idle workers -> when, in pod order
    saving: bool = False  # some of its jobs cost much less in a batch
    crowded: bool = False  # somebody is late already, and nothing is saved by batches
    running: int = 0
    promised: int = 0  # with a firm promise that can still be kept
    # Hopeless, could start now, with the steps left.
    spare: list[tuple[Entry, Prices, int]] = field(default_factory=list)
    slow: int = 0  # workers in long best-effort steps
    need: int = 1  # width that a newcomer may need at once, by what came lately

    def tables(self) -> Tables:
        """The prices as matrices."""
        step_us = np.array([p.step_us for p in self.prices]).reshape(len(self.prices), -1)
        batch_max = max((len(p.batch_us) for p in self.prices), default=1)
        batch_us = np.full((len(self.prices), batch_max), NEVER)
        for row, p in zip(batch_us, self.prices, strict=True):
            row[: len(p.batch_us)] = p.batch_us
        return Tables(np.array(self.widths, np.int64), step_us, batch_us, step_us.min(axis=1))


class RosterMaker:
    """Makes rosters; prices are asked for once a plan."""

    def __init__(
        self,
        priority_worth: float,
        fill_step_us: int,
        batch_max: int,
        guard: Guard,
        patience: Patience,
    ) -> None:
        self._priority_worth = priority_worth
        self._batch_max = batch_max
        self._fill_step_us = fill_step_us
        self._guard = guard
        self._patience = patience
        self._needs: deque[int] = deque(maxlen=NEEDS_MAX)
        self._prices: dict[tuple[tuple[str, ...], tuple[int, ...], str, Shape, str], Prices] = {}

    def guard_us(self, request: Request, arrived_us: int) -> int:
        """What is kept in hand of a firm promise's time."""
        if not request.firm or request.deadline_us is None:
            return 0
        return min(self._guard.us_max, int(self._guard.part * (request.deadline_us - arrived_us)))

    def worth(self, request: Request) -> float:
        """What making its deadline is worth, in deadlines: something, and less than a promise."""
        worth = 1.0 + self._priority_worth * request.priority
        return min(PROMISED_WORTH / 2, max(_WORTH_LEAST, worth))

    def forget(self) -> None:
        """A new plan: prices may have changed."""
        self._prices.clear()

    def make(self, ledger: Ledger, pod: Pod, now_us: int, look: bool = False) -> Roster:
        """The pod's jobs in deadline order; those with no worker to wait for are due now.

        With a lead, a worker counts as free that soon ends the one run it has in hand. Who is late
        does not: nobody knows until when, and its report will ask again. With `look` nothing is
        noted: questions between plans must not change plans.
        """
        roster = Roster(widths=widths_of(pod))
        roster.free = self.free(ledger, pod, now_us)
        rows: list[tuple[float, ...]] = []
        numbers: dict[Kind, int] = {}
        held: set[int] = set()
        aged: list[tuple[float, int]] = []
        names = {w.name for w in pod.workers}
        failing = ledger.quarantine.any_failing
        mixed = bool(ledger.named) or ledger.cluster.partial
        for entry in pod.entries:
            tracked, request = entry.tracked, entry.tracked.request
            if ledger.tracked.get(request.id) is not tracked:
                continue  # it ended since the last plan
            if failing and not tracked.outstanding and pod.waits(ledger, entry, roster.free):
                continue
            outside = mixed and pod.outside(ledger, tracked)  # others run its next call
            waits = not outside and self._waits(entry, now_us)
            if waits and look and request.deadline_us is None:
                continue  # nobody who asks looks at it
            alone = request.id if tracked.alone == tracked.stepped.node else ""
            kind = (request.model, request.shape, request.workflow, alone)
            number = numbers.get(kind)
            if number is None:
                number = numbers[kind] = len(roster.kinds)
                roster.kinds.append(kind)
                roster.prices.append(self.price(ledger, pod, roster.widths, request))
            prices = roster.prices[number]
            if not entry.need and not look:
                entry.need = need_of(entry, prices, roster.widths)
                self._needs.append(entry.need)
            if waits and request.deadline_us is None:  # as its row would have it
                entry.hopeful = False
                roster.spare.append((entry, prices, max(0, request.steps - tracked.steps_done)))
                continue
            if waits:
                row = self._row_of_waiting(entry, number, prices, now_us)
            else:
                row = self._row(ledger, entry, number, prices, names, held, now_us)
                if outside:
                    row = (*row[:AVAIL], max(row[AVAIL], now_us + 1.0), *row[AVAIL + 1 :])
            if row[AVAIL] <= now_us and hopeless(row, prices):
                if row[AGED] <= 0:
                    entry.hopeful = entry.hopeful and look
                    roster.spare.append((entry, prices, int(row[STEPS_LEFT])))
                    continue
                aged.append((row[AGED], len(rows)))
            if row[AVAIL] > now_us and not entry.hopeful and tracked.outstanding:
                flight = ledger.board.flights[tracked.outstanding[-1]]
                if flight.assignment.step_time_us > self._fill_step_us:
                    roster.slow += int(row[WIDTH])
            rows.append(row)
            roster.entries.append(entry)
            roster.running += row[AVAIL] > now_us
            roster.promised += tracked.promised
        self._spare_younger(roster, rows, aged)
        roster.need = max(self._needs, default=1)
        first = roster.spare[0][0].tracked.request if roster.spare else None
        late = first is not None and first.deadline_us is not None  # best effort stands behind
        roster.saving = any(price.batches_save for price in roster.prices)
        roster.crowded = late and not roster.saving
        roster.jobs = np.array(rows).reshape(len(rows), COLUMNS)
        return roster

    def _spare_younger(
        self, roster: Roster, rows: list[tuple[float, ...]], aged: list[tuple[float, int]]
    ) -> None:
        younger = sorted(aged, reverse=True)[self._patience.places :]
        for at in sorted((at for _, at in younger), reverse=True):
            row, entry = rows.pop(at), roster.entries.pop(at)
            price = roster.prices[int(row[KIND])]
            insort(roster.spare, (entry, price, int(row[STEPS_LEFT])), key=lambda s: s[0].key)

    def price(self, ledger: Ledger, pod: Pod, widths: tuple[int, ...], request: Request) -> Prices:
        """Call times of the request's kind there."""
        key = (pod.gpus, widths, request.model, request.shape, request.workflow)
        known = self._prices.get(key)
        if known is None:
            facts = pod.workers[0].models[request.model]
            workflow = ledger.workflow(request)
            stepped = workflow.stepped

            def call(node: str, degree: int = 1, batch: int = 1) -> int:
                return ledger.predict(request, node, degree, pod.gpus, batch).safe_us

            def span(node: str) -> int:
                return ledger.span(request, node).safe_us

            wide = workflow.node[stepped].degrees is Degrees.OFFERED
            able = tuple(k for k in widths if k == 1 or (wide and k in facts.degrees))
            steps_of = ledger.call(request, stepped)
            able = ledger.memory.wide_enough(steps_of, pod.gpus, able)
            steps = [float(call(stepped, k)) if k in able else NEVER for k in widths]
            most = min(facts.batch_max, self._batch_max or facts.batch_max)
            most = ledger.memory.batch_max(steps_of, pod.gpus, most)
            batches = [float(call(stepped, 1, b)) for b in range(1, most + 1)]
            known = Prices(
                {node: call(node) for node in (*workflow.upstream, *workflow.after)},
                workflow.longest_us(workflow.before, call),
                workflow.longest_us(workflow.behind, call if workflow.ending else span),
                tuple(steps),
                tuple(batches),
            )
            self._prices[key] = known
        return known

    def free(self, ledger: Ledger, pod: Pod, now_us: int) -> dict[str, int]:
        """Workers that are idle, or as good as, with when they are."""
        until_us = now_us + ledger.settings.lead_us
        ends: dict[int, int] = {}
        free: dict[str, int] = {}
        for worker in pod.workers:
            end_us = max(worker.freed_us, now_us)
            hand = pod.running(ledger, worker.name)
            for sequence in hand:
                if sequence not in ends:
                    ends[sequence] = flight_end_us(ledger, sequence)
                end_us = max(end_us, ends[sequence])
            late = any(ends[sequence] <= now_us for sequence in hand)
            if end_us <= until_us and len(hand) <= 1 and not late:
                free[worker.name] = end_us
        return free

    def _waits(self, entry: Entry, now_us: int) -> bool:
        """Nothing of it has begun, and it has not waited too long: most of a long queue."""
        tracked = entry.tracked
        if tracked.promised or not tracked.untouched:
            return False
        hopes = entry.hopeful and tracked.request.deadline_us is not None
        idle_us = now_us - tracked.progressed_us
        return hopes or self._patience.lasts(idle_us, now_us - tracked.arrived_us)

    def _row_of_waiting(
        self, entry: Entry, number: int, prices: Prices, now_us: int
    ) -> tuple[float, ...]:
        """As `_row`, of one that waits."""
        tracked, request = entry.tracked, entry.tracked.request
        return (
            float(number),
            float(prices.before_us),
            float(max(0, request.steps - tracked.steps_done)),
            float(prices.after_us),
            -1.0 if request.deadline_us is None else float(request.deadline_us),
            float(now_us),
            0.0,
            self.worth(request),
            0.0,
            0.0,
        )

    def _row(
        self,
        ledger: Ledger,
        entry: Entry,
        number: int,
        prices: Prices,
        names: set[str],
        held: set[int],
        now_us: int,
    ) -> tuple[float, ...]:
        """Columns as in `kernel`."""
        tracked, request = entry.tracked, entry.tracked.request
        outstanding = tracked.outstanding
        avail_us, width, steps_left = now_us, 0, request.steps - tracked.steps_done
        if outstanding:
            sequence = outstanding[-1]
            flight = ledger.board.flights[sequence]
            avail_us = flight_end_us(ledger, sequence)
            if tracked.stepped.outstanding:
                steps_left = request.steps - ledger.steps_behind(tracked)
            ahead = len(outstanding) > 1 or bool(tracked.last.outstanding) or avail_us <= now_us
            # Its next call is one of the next pass: that is not begun before these steps are told.
            ahead = ahead or (steps_left <= 0 and not tracked.workflow.ending)
            if ahead or avail_us > now_us + ledger.settings.lead_us:
                avail_us = max(avail_us, now_us + 1)  # nothing more can be given to it now
            else:
                avail_us = now_us
            if sequence not in held and avail_us > now_us:
                held.add(sequence)
                width = sum(w in names for w in flight.assignment.workers)
        before_us = 0 if tracked.preparing else prices.before_us
        ending = tracked.ending
        deadline_us = request.deadline_us
        guard_us = self.guard_us(request, tracked.arrived_us) if tracked.promised else 0
        age, idle_us = 0.0, now_us - tracked.progressed_us
        if (deadline_us is None or not entry.hopeful) and not self._patience.lasts(
            idle_us, now_us - tracked.arrived_us
        ):
            step_us = prices.fastest_us
            own_us = prices.before_us + request.steps * step_us + prices.after_us
            waited_us = now_us - tracked.arrived_us - tracked.steps_done * step_us
            age = self._patience.age(idle_us, waited_us, own_us)
        return (
            float(number),
            float(before_us),
            float(0 if ending else max(0, steps_left)),
            float(0 if ending else prices.after_us),
            float(-1 if deadline_us is None else deadline_us - guard_us),
            float(avail_us),
            float(width),
            self.worth(request) + PROMISED_WORTH * tracked.promised,
            age,
            float(guard_us),
        )


def hopeless(row: tuple[float, ...], prices: Prices) -> bool:
    """Begun now and alone, at its fastest, it would still be late."""
    steps_us = row[STEPS_LEFT] * prices.fastest_us
    end_us = row[AVAIL] + row[TEXT_LEFT] + steps_us + row[VAE_LEFT]
    return end_us > row[DEADLINE] + row[GUARD] + EPS


def need_of(entry: Entry, prices: Prices, widths: tuple[int, ...]) -> int:
    """Smallest width at which a request would be on time if it ran alone from its arrival."""
    request = entry.tracked.request
    if request.deadline_us is None:
        return widths[0]
    time_us = request.deadline_us - entry.tracked.arrived_us - prices.before_us - prices.after_us
    for width, step_us in zip(widths, prices.step_us, strict=True):
        if step_us < NEVER and request.steps * step_us <= time_us:
            return width
    return widths[prices.step_us.index(min(prices.step_us))]


def widths_of(pod: Pod) -> tuple[int, ...]:
    """Degrees on offer in a pod."""
    degrees = {1} | {d for m in pod.workers[0].models.values() for d in m.degrees}
    return tuple(d for d in sorted(degrees) if d <= len(pod.workers))
