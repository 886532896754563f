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
        before = self._lost(future, future.jobs, future.on)
        jobs = np.insert(future.jobs, at, row, axis=0)
        on = np.insert(future.on, at, 1)
        lost = self._lost(future, jobs, on)
        finish_us = self._finish[at]
        if finish_us <= 0 or lost > before:
            return None
        return int(finish_us)

    def _lost(self, future: _Future, jobs: Floats, on: Ints) -> int:
        space = scratch(len(jobs))
        gpus = len(future.pod.workers)
        rollout(float(self._now_us), gpus, jobs, on, future.roster.tables(), self._rules, space)
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
    ledger: Ledger, pods: Pods, maker: RosterMaker, rules: Rules, request: Request, now_us: int
) -> int | None:
    return Forecaster(ledger, pods, maker, rules, now_us).finish_us(request)
