"""What the requests inside ask of the workers, by model and kind of GPU: for the scaling signal.

One pass over the requests; call times come from the latency model, each asked once. Work is what
one worker of the kind would take, steps at degree 1. A model that several kinds serve is split as
they could share it evenly: by their workers' speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..books.ledger import Ledger
from ..books.tracker import Tracked
from ..values import Request, Shape


@dataclass(slots=True)
class PoolWork:
    """Requests of one model, as far as one kind of GPU would serve them."""

    workers: int = 0  # usable, of this kind, with the model
    arrived: float = 0.0  # newcomers …
    arrived_us: float = 0.0  # … and their work
    due: list[tuple[int, int]] = field(default_factory=list)  # (time left, work), in µs
    requests: int = 0
    with_deadline: int = 0
    late: int = 0  # of those, the ones that cannot be met any more, and could at their arrival
    waiting: int = 0  # requests, while no worker has the model


class _Price(NamedTuple):
    """Call times of a model and shape on one worker of a kind, in µs."""

    before: int
    step: int
    after: int
    widest: int  # degree

    def whole_us(self, steps: int) -> int:
        return self.before + steps * self.step + self.after


class DemandCensus:
    """One question's answers: `of` fills it."""

    def __init__(self, ledger: Ledger, kinds: Mapping[str, Sequence[str]]) -> None:
        """`kinds`: of GPU on which a model was seen before, for one that no worker has now."""
        # By model and kind of GPU; "" instead of a model: workers of the kind, whatever they serve.
        self.pools: dict[tuple[str, str], PoolWork] = {}
        self._ledger = ledger
        self._kinds = kinds
        self._prices: dict[tuple[str, Shape, str, str], _Price] = {}
        self._able: dict[str, Counter[str]] = {}  # by model: usable workers of each kind
        for worker in ledger.cluster.usable():
            self._pool("", worker.gpu).workers += 1
            for model in worker.models:
                self._able.setdefault(model, Counter())[worker.gpu] += 1
        for model, able in self._able.items():
            for gpu, count in able.items():
                self.pools[model, gpu] = PoolWork(workers=count)

    def of(
        self, newcomers: Sequence[tuple[Request, int]], now_us: int, best_effort_us: int
    ) -> dict[tuple[str, str], PoolWork]:
        """Work by pool. `newcomers` are requests, with how many of each came; best effort is due
        `best_effort_us` after its last progress.
        """
        for tracked in self._ledger.tracked.values():
            self._inside(tracked, now_us, best_effort_us)
        for request, count in newcomers:
            for leg in self._ledger.enter(request):
                for gpu, share in self._shares(leg):
                    whole_us = self._price(leg, gpu).whole_us(leg.steps)
                    pool = self._pool(leg.model, gpu)
                    pool.arrived += share * count
                    pool.arrived_us += share * count * whole_us
        return self.pools

    def _inside(self, tracked: Tracked, now_us: int, best_effort_us: int) -> None:
        request, deadline_us = tracked.request, tracked.request.deadline_us
        due_us = tracked.progressed_us + best_effort_us if deadline_us is None else deadline_us
        for gpu, share in self._shares(request):
            price, pool = self._price(request, gpu), self._pool(request.model, gpu)
            later_us = self._later_us(tracked, gpu)
            left_us = _left_us(tracked, price) + later_us
            pool.due.append((due_us - now_us, round(share * left_us)))
            pool.requests += 1
            pool.waiting += request.model not in self._able
            if deadline_us is not None:
                pool.with_deadline += 1
                whole_us = price.whole_us(request.steps) + later_us
                hopeless = tracked.arrived_us + whole_us / price.widest
                lost = now_us + left_us / price.widest > deadline_us
                pool.late += lost and hopeless <= deadline_us

    def _later_us(self, tracked: Tracked, gpu: str) -> int:
        """Of the passes behind the one that a request is in, on workers of that kind."""
        later = tracked.legs[tracked.workflow.at + 1 :]
        return sum([self._price(leg, gpu).whole_us(leg.steps) for leg in later])

    def _pool(self, model: str, gpu: str) -> PoolWork:
        return self.pools.setdefault((model, gpu), PoolWork())

    def _shares(self, request: Request) -> list[tuple[str, float]]:
        """Kinds of GPU that serve a request's model, each with its part of the work."""
        able = self._able.get(request.model)
        if not able:
            known = self._kinds.get(request.model) or ("",)
            return [(known[0], 1.0)]
        if len(able) == 1:
            return [(next(iter(able)), 1.0)]
        steps = max(1, request.steps)
        speed = {g: n / max(1, self._price(request, g).whole_us(steps)) for g, n in able.items()}
        return [(gpu, speed[gpu] / sum(speed.values())) for gpu in sorted(speed)]

    def _price(self, request: Request, gpu: str) -> _Price:
        key = (request.model, request.shape, request.workflow, gpu)
        known = self._prices.get(key)
        if known is None:
            ledger, workflow = self._ledger, self._ledger.workflow(request)

            def call_us(node: str) -> int:
                return ledger.predict(request, node, 1, (gpu,)).mean_us

            known = self._prices[key] = _Price(
                sum(call_us(node) for node in workflow.before),
                call_us(workflow.stepped),
                sum(call_us(node) for node in workflow.after),
                max(ledger.cluster.degrees(request.model), default=1),
            )
        return known


def _left_us(tracked: Tracked, price: _Price) -> int:
    steps = max(0, tracked.request.steps - tracked.steps_done)
    before_us = 0 if tracked.prepared else price.before
    return before_us + steps * price.step + price.after
