"""When will it be done? An estimate for clients, not for plans.

A fluid picture: the GPU time of everything more urgent is shared out over all workers, then the
request itself runs at the degree that its policy likely gives it. Mean times; encode and decode
included.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from .board import Forecast
from .ledger import Ledger
from .lifecycle import JobState
from .planners import Planner
from .tracker import Tracked
from .values import DIT, TEXT, VAE, Request, Shape

Urgency = tuple[int, bool, int, int]


class Estimates:
    """Estimates from one state of the ledger: whoever changes it says so with `forget`.

    Until then the queue is summed up once, so that each question costs a search in it.
    """

    def __init__(self, ledger: Ledger, policy: Planner) -> None:
        self._ledger = ledger
        self._policy = policy
        self.forget()

    def forget(self) -> None:
        """The ledger changes."""
        self._queue: tuple[list[Urgency], list[int]] | None = None
        self._forecast: tuple[int, Forecast] | None = None
        self._gpus: tuple[str, ...] | None = None
        self._mean_us: dict[tuple[str, Shape, str], int] = {}

    def newcomer_finish_us(self, request: Request, now_us: int) -> int:
        """Finish of a request that arrived now."""
        own_us = self._stage_us(request, TEXT) + request.steps * self._step_us(request)
        own_us += self._stage_us(request, VAE)
        return (
            now_us + self._queue_us(_urgency(request, self._ledger.arrivals), request.id) + own_us
        )

    def finish_us(self, tracked: Tracked, now_us: int) -> int:
        """Finish of a request inside."""
        ledger, request = self._ledger, tracked.request
        text, dit, vae = (tracked.jobs[n].state for n in (TEXT, DIT, VAE))
        ready_us = now_us
        if tracked.outstanding:
            forecast = self._forecast_at(now_us)
            ready_us = max(now_us, *(forecast.end_us[s] for s in tracked.outstanding))
        if vae is JobState.ASSIGNED:
            return ready_us
        covered = sum(ledger.board.flights[s].steps_left for s in tracked.jobs[DIT].outstanding)
        left = max(0, request.steps - tracked.steps_done - covered)
        own_us = left * self._step_us(request) + self._stage_us(request, VAE)
        if text in (JobState.READY, JobState.BLOCKED):
            own_us += self._stage_us(request, TEXT)
        queue_us = 0
        if dit is not JobState.DONE and left > 0:
            queue_us = self._queue_us(_urgency(request, tracked.order), request.id)
        return max(ready_us, now_us + queue_us) + own_us

    def _queue_us(self, mine: Urgency, request: str) -> int:
        """Work of whoever is served before (higher priority, earlier deadline, earlier arrival),
        shared out over all workers.
        """
        if self._queue is None:
            tracked = sorted(
                (_urgency(t.request, t.order), self._work_us(t))
                for t in self._ledger.tracked.values()
            )
            self._queue = (
                [urgency for urgency, _ in tracked],
                list(accumulate((work_us for _, work_us in tracked), initial=0)),
            )
        urgencies, sums_us = self._queue
        work_us = sums_us[bisect_left(urgencies, mine)]
        same = self._ledger.tracked.get(request)  # a newcomer may be inside already
        if same is not None and _urgency(same.request, same.order) < mine:
            work_us -= self._work_us(same)
        return work_us // max(1, len(self._ledger.cluster.usable()))

    def _work_us(self, tracked: Tracked) -> int:
        request = tracked.request
        left = request.steps - tracked.steps_done
        return left * self._stage_us(request, DIT) + self._stage_us(request, VAE)

    def _stage_us(self, request: Request, node: str) -> int:
        """One call of the node on one worker of the slowest kind."""
        key = (request.model, request.shape, node)
        if key not in self._mean_us:
            if self._gpus is None:
                self._gpus = self._ledger.gpus(())
            self._mean_us[key] = self._ledger.predict(request, node, 1, self._gpus).mean_us
        return self._mean_us[key]

    def _step_us(self, request: Request) -> int:
        times = self._ledger.rates(request).width_us
        return times[self._policy.likely_degree(times)]

    def _forecast_at(self, now_us: int) -> Forecast:
        if self._forecast is None or self._forecast[0] != now_us:
            ledger = self._ledger
            self._forecast = now_us, ledger.board.forecast(ledger.cluster, now_us)
        return self._forecast[1]


def _urgency(request: Request, order: int) -> Urgency:
    return (-request.priority, request.deadline_us is None, request.deadline_us or 0, order)
