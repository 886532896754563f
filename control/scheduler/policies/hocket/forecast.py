"""When would newcomers be done? Rollouts of their pods with them inside.

Not an estimate of a queue: the same future that the planner judges its own starts by, at safe step
times. It knows nothing of who comes later. A newcomer is late where it would be late itself, or
where somebody would be whom a firm promise was made: the planner would give the newcomer up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...ledger import Ledger
from ...values import Request
from .kernel import (
    COLUMNS,
    DEADLINE,
    FINISH,
    PROMISED_WORTH,
    WEIGHT,
    Floats,
    Ints,
    Rules,
    rollout,
    scratch,
)
from .pods import Pod, Pods
from .search import give_up
from .roster import Roster, RosterMaker

FAR_US = 1e15  # the deadline of who has none


@dataclass(slots=True)
class _Future:
    """One pod, with those newcomers that it has taken in."""

    pod: Pod
    roster: Roster
    jobs: Floats
    on: Ints
    kept: set[int] = field(default_factory=set)
    work_us: int = 0


class Forecaster:
    """Forecasts from one state of the ledger."""

    def __init__(
        self, ledger: Ledger, pods: Pods, maker: RosterMaker, rules: Rules, now_us: int
    ) -> None:
        self._ledger = ledger
        self._pods = pods
        self._maker = maker
        self._rules = rules
        self._now_us = now_us
        self._futures: dict[int, _Future] = {}

    def finish_us(self, request: Request) -> int | None:
        """Finish in the pod that it would join; None if it is late there, or nobody can."""
        pod = self._pods.best(request.model)
        if pod is None:
            return None
        future = self._future(pod)
        price = self._maker.price(self._ledger, pod, future.roster.widths, request)
        future.roster.prices.append(price)
        row = np.zeros(COLUMNS)
        deadline_us = FAR_US if request.deadline_us is None else float(request.deadline_us)
        deadline_us -= self._maker.guard_us(request, self._now_us)
        row[:8] = (
            len(future.roster.prices) - 1,
            price.text_us,
            request.steps,
            price.vae_us,
            deadline_us,
            self._now_us,
            0.0,
            self._maker.worth(request),
        )
        at = int(np.searchsorted(future.jobs[:, DEADLINE], deadline_us, side="right"))
        jobs = np.insert(future.jobs, at, row, axis=0)
        on = np.insert(future.on, at, 1)
        first = None
        for level in (0.0, 0.5, 1.0):
            slow = 1.0 + level * self.caution
            before = self._lost(future, future.jobs, future.on, slow)
            lost = self._lost(future, jobs, on, slow)
            finish_us = self._finish[at]
            if (finish_us <= 0 and (request.firm or first is None)) or lost > before:
                return None
            first = finish_us if first is None else first
            if not request.firm and not before:
                break
        if request.firm and self.ghosts and not self._worth_it(future, at, jobs, on, request):
            return None
        return int(first)

    def _worth_it(self, future, at, jobs, on, request) -> bool:
        span = request.deadline_us - self._now_us
        rows = []
        for arrived_us, past in future.pod.arrivals:
            if arrived_us <= self._now_us - span or arrived_us >= self._now_us:
                continue
            shift = span
            price = self._maker.price(self._ledger, future.pod, future.roster.widths, past)
            future.roster.prices.append(price)
            row = np.zeros(COLUMNS)
            row[:8] = (len(future.roster.prices) - 1, price.text_us, past.steps, price.vae_us,
                past.deadline_us + shift if past.deadline_us else FAR_US, arrived_us + shift, 0.0, self._maker.worth(past))
            if past.deadline_us:
                rows.append(row)
        if not rows:
            return True
        more = np.array(rows)
        def value(jobs, on):
            alljobs = np.vstack([jobs, more])
            allon = np.concatenate([on, np.ones(len(more), np.int64)])
            order = np.argsort(alljobs[:, DEADLINE], kind="stable")
            alljobs = np.ascontiguousarray(alljobs[order]); allon = np.ascontiguousarray(allon[order])
            space = scratch(len(alljobs))
            give_up(float(self._now_us), len(future.pod.workers), alljobs, allon, future.roster.tables(), self._rules, self.limits, space)
            return float((alljobs[:, WEIGHT] * (allon>0)).sum())
        with_jobs = jobs.copy()
        own = with_jobs[at, WEIGHT]
        with_jobs[at, WEIGHT] += PROMISED_WORTH
        there = value(with_jobs, on) - PROMISED_WORTH
        without = value(future.jobs.copy(), future.on)
        future.roster.prices = future.roster.prices[:len(future.roster.prices)-len(rows)]
        return there >= without - self.ghosts + own*0

    def _lost(self, future: _Future, jobs: Floats, on: Ints, slow: float) -> int:
        space = scratch(len(jobs))
        gpus = len(future.pod.workers)
        tab = future.roster.tables()
        tab = tab._replace(step_us=np.minimum(tab.step_us*slow,1e18),batch_us=np.minimum(tab.batch_us*slow,1e18),fastest_us=tab.fastest_us*slow)
        rollout(float(self._now_us), gpus, jobs, on, tab, self._rules, space)
        self._finish = space.floats[FINISH]
        return int(((jobs[:, WEIGHT] >= PROMISED_WORTH) & (self._finish < 0)).sum())

    def _future(self, pod: Pod) -> _Future:
        known = self._futures.get(pod.index)
        if known is None:
            roster = self._maker.make(self._ledger, pod, self._now_us, look=True)
            on = np.array([e.hopeful or e.tracked.promised for e in roster.entries], np.int64)
            known = self._futures[pod.index] = _Future(pod, roster, roster.jobs, on)
        return known


def newcomer_finish_us(
    ledger: Ledger, pods: Pods, maker: RosterMaker, rules: Rules, request: Request, now_us: int, caution: float, ghosts, limits
) -> int | None:
    f = Forecaster(ledger, pods, maker, rules, now_us)
    f.caution = caution
    f.ghosts, f.limits = ghosts, limits
    return f.finish_us(request)
