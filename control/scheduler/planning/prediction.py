"""When will it be done? An estimate for clients, not for plans.

A fluid picture: the GPU time of everything more urgent is shared out over all workers, then the
request itself runs at the degree that its policy likely gives it. Mean times; encode and decode
included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from ..books.board import BoardForecast
from ..books.catalogue import CallSpec
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Tracked
from ..policies.base import Planner
from ..values import Request
from ..workflow import NodeKind, Workflow

PRICES_MAX = 4096  # call times kept
Urgency = tuple[int, bool, int, int]


class Estimates:
    """Estimates from one state of the ledger: whoever changes it says so with `forget`.

    Until then the queue is summed up once, so that each question costs a search in it. From one
    state to the next only those requests are looked at anew that the ledger says progressed.
    """

    def __init__(self, ledger: Ledger, policy: Planner) -> None:
        self._ledger = ledger
        self._planner = policy
        self._urgencies: list[Urgency] = []  # of all requests inside, ascending
        self._works_us: list[int] = []  # beside it
        self._known: dict[str, Urgency] = {}
        self._mean_us: dict[CallSpec, int] = {}
        self._version = (-1, -1)
        ledger.progressed = None  # one reader at a time, and this one knows nothing yet
        self.forget()

    def forget(self) -> None:
        """The ledger changes."""
        self._sums_us: list[int] | None = None
        self._forecast: tuple[int, BoardForecast] | None = None

    def newcomers_finish_us(self, requests: Sequence[Request], now_us: int) -> list[int]:
        """Finishes of requests that arrived now, each behind those before it: by the planner's own
        forecast where it has one. Who is late by that is not told anything earlier.
        """
        told: list[int] = []
        for request, known in zip(
            requests, self._planner.newcomers(self._ledger, requests, now_us), strict=True
        ):
            finish_us = known.finish_us
            if finish_us is None:
                finish_us = self._fluid_us(request, now_us)
                if known.late and request.deadline_us is not None:
                    finish_us = max(finish_us, request.deadline_us + 1)
            told.append(finish_us)
        return told

    def alone_us(self, request: Request) -> int:
        """What a newcomer would take if nobody else wanted anything, by the same estimate."""
        rates = self._ledger.rates(request)
        if self._planner.foresees and rates.degrees:  # at safe times, on the fastest kind
            return min(self._safe_us(request, rates.degrees, (gpu,)) for gpu in rates.gpus)
        return self._whole_us(request)

    def _safe_us(self, request: Request, degrees: Sequence[int], gpus: tuple[str, ...]) -> int:
        predict, workflow = self._ledger.predict, self._ledger.workflow(request)
        step_us = min(
            predict(request, workflow.stepped, degree, gpus).safe_us for degree in degrees
        )

        def call_us(node: str) -> int:
            return predict(request, node, 1, gpus).safe_us

        before_us = workflow.longest_us(workflow.before, call_us)
        if workflow.ending:
            after_us = workflow.longest_us(workflow.after, call_us)
        else:
            after_us = self._ledger.rates(request).after_safe_us
        return before_us + request.steps * step_us + after_us

    def _whole_us(self, request: Request) -> int:
        """All its calls at mean times, the steps at their likely degree."""
        workflow = self._ledger.workflow(request)
        calls_us = self._calls_us(request, workflow.before) + self._calls_us(
            request, workflow.behind
        )
        return calls_us + request.steps * self._step_us(request)

    def _fluid_us(self, request: Request, now_us: int) -> int:
        queue_us = self._queue_us(_urgency(request, self._ledger.arrivals), request.id)
        return now_us + queue_us + self._whole_us(request)

    def finish_us(self, tracked: Tracked, now_us: int) -> int:
        """Finish of a request inside."""
        ledger, request = self._ledger, tracked.request
        workflow, stepped = tracked.workflow, tracked.stepped
        ready_us = now_us
        if tracked.outstanding:
            forecast = self._forecast_at(now_us)
            ready_us = max(now_us, *(forecast.end_us[s] for s in tracked.outstanding))
        if tracked.last.state is JobState.ASSIGNED:
            return ready_us
        covered = sum(ledger.board.flights[s].steps_left for s in stepped.outstanding)
        left = max(0, request.steps - tracked.steps_done - covered)
        own_us = left * self._step_us(request) + self._calls_us(request, workflow.behind)
        if not tracked.preparing:
            own_us += self._calls_us(request, workflow.before)
        queue_us = 0
        if stepped.state is not JobState.DONE and left > 0:
            queue_us = self._queue_us(_urgency(request, tracked.order), request.id)
        return max(ready_us, now_us + queue_us) + own_us

    def _queue_us(self, mine: Urgency, request: str) -> int:
        """Work of whoever is served before (higher priority, earlier deadline, earlier arrival),
        shared out over all workers that denoise.
        """
        sums_us = self._sums_us
        if sums_us is None:
            self._follow()
            sums_us = self._sums_us = list(accumulate(self._works_us, initial=0))
        work_us = sums_us[bisect_left(self._urgencies, mine)]
        same = self._ledger.tracked.get(request)  # a newcomer may be inside already
        if same is not None and _urgency(same.request, same.order) < mine:
            work_us -= self._work_us(same)
        return work_us // max(1, len(self._ledger.cluster.denoisers()))

    def _follow(self) -> None:
        """Takes over what progressed since the last time; everything where a price changed."""
        ledger = self._ledger
        progressed, ledger.progressed = ledger.progressed, {}
        if self._prices_changed() or progressed is None:
            inside = sorted((_urgency(t.request, t.order), t) for t in ledger.tracked.values())
            self._urgencies = [urgency for urgency, _ in inside]
            self._works_us = [self._work_us(t) for _, t in inside]
            self._known = {t.id: urgency for urgency, t in inside}
            return
        for request in progressed:
            tracked = ledger.tracked.get(request)
            urgency = None if tracked is None else _urgency(tracked.request, tracked.order)
            before = self._known.get(request)
            if before is not None and before != urgency:
                place = bisect_left(self._urgencies, before)
                del self._urgencies[place], self._works_us[place], self._known[request]
            if tracked is None or urgency is None:
                continue
            place = bisect_left(self._urgencies, urgency)
            if before != urgency:
                self._urgencies.insert(place, urgency)
                self._works_us.insert(place, 0)
                self._known[request] = urgency
            self._works_us[place] = self._work_us(tracked)

    def _prices_changed(self) -> bool:
        """Some call takes another time than when it was asked for; forgets them all then."""
        version = (self._ledger.cluster.version, self._ledger.latency.version)
        if version == self._version and len(self._mean_us) < PRICES_MAX:
            return False
        self._version = version
        before, self._mean_us = self._mean_us, {}
        gpus = self._ledger.gpus(())
        for call, mean_us in before.items():
            asked = (call.model, call.shape, call.op, 1, gpus, 1)
            if self._ledger.latency.predict_call(asked).mean_us != mean_us:
                return True
        if len(before) < PRICES_MAX:
            self._mean_us = before
        return False

    def _work_us(self, tracked: Tracked) -> int:
        request, workflow = tracked.request, tracked.workflow
        left = request.steps - tracked.steps_done
        steps_us = left * self._call_us(request, workflow.stepped)
        return steps_us + self._calls_us(request, workflow.behind)

    def _calls_us(self, request: Request, nodes: tuple[str, ...]) -> int:
        """The critical path of nodes that are called once, and of later passes."""
        workflow = self._ledger.workflow(request)
        return workflow.longest_us(nodes, lambda node: self._span_us(request, workflow, node))

    def _span_us(self, request: Request, workflow: Workflow, node: str) -> int:
        if workflow.node[node].kind is NodeKind.ONCE:
            return self._call_us(request, node)
        return self._ledger.span(request, node).mean_us

    def _call_us(self, request: Request, node: str) -> int:
        """One call of the node on one worker of the slowest kind."""
        ledger = self._ledger
        if self._version != (ledger.cluster.version, ledger.latency.version):
            return ledger.predict(request, node, 1, ledger.gpus(())).mean_us
        key = ledger.call(request, node)
        mean_us = self._mean_us.get(key)
        if mean_us is None:
            mean_us = ledger.predict(request, node, 1, ledger.gpus(())).mean_us
            self._mean_us[key] = mean_us
        return mean_us

    def _step_us(self, request: Request) -> int:
        times = self._ledger.rates(request).width_us
        return times[self._planner.likely_degree(times)]

    def _forecast_at(self, now_us: int) -> BoardForecast:
        if self._forecast is None or self._forecast[0] != now_us:
            ledger = self._ledger
            self._forecast = now_us, ledger.board.forecast(ledger.cluster, now_us)
        return self._forecast[1]


def _urgency(request: Request, order: int) -> Urgency:
    return (-request.priority, request.deadline_us is None, request.deadline_us or 0, order)
