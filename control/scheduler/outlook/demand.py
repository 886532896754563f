"""What the requests inside ask of the workers, by model and kind of GPU: for the scaling signal.

One pass over the requests; call times come from the latency model, once for a model and shape. Work
is what one worker of the kind would take, steps at degree 1. A model that several kinds serve is
split as they could share it evenly: by their workers' speed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..books.ledger import Ledger
from ..books.tracker import Tracked
from ..values import Request, Shape

_SECOND_US = 1_000_000


@dataclass(slots=True)
class PoolWork:
    """Requests of one model, as far as one kind of GPU would serve them."""

    workers: int = 0  # usable, of this kind, with the model
    arrived: float = 0.0  # newcomers …
    arrived_us: float = 0.0  # … and their work
    # (time left, work), in µs, ascending; times left are rounded down to seconds.
    due: list[tuple[int, int]] = field(default_factory=list)
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


class _Part(NamedTuple):
    """What a kind of GPU has of a model and shape."""

    share: float  # of the work
    price: _Price
    pool: PoolWork
    due: defaultdict[int, float]  # work, by seconds left


class DemandCensus:
    """One question's answers: `of` fills it."""

    def __init__(self, ledger: Ledger, kinds: Mapping[str, Sequence[str]]) -> None:
        """`kinds`: of GPU on which a model was seen before, for one that no worker has now."""
        # By model and kind of GPU; "" instead of a model: workers of the kind, whatever they serve.
        self.pools: dict[tuple[str, str], PoolWork] = {}
        self._ledger = ledger
        self._kinds = kinds
        self._parts: dict[tuple[str, Shape, str], list[_Part]] = {}
        self._due: dict[int, defaultdict[int, float]] = {}  # by pool's identity
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
            if request.workflow not in self._ledger.catalogue.known:
                continue  # it ended, and was forgotten with its workflow
            for leg in self._ledger.enter(request):
                for part in self._of(leg):
                    part.pool.arrived += part.share * count
                    part.pool.arrived_us += part.share * count * part.price.whole_us(leg.steps)
        for pool in self.pools.values():
            found = sorted(self._due.get(id(pool), {}).items())
            pool.due = [(left_s * _SECOND_US, round(work_us)) for left_s, work_us in found]
        return self.pools

    def _inside(self, tracked: Tracked, now_us: int, best_effort_us: int) -> None:
        request, deadline_us = tracked.request, tracked.request.deadline_us
        due_us = tracked.progressed_us + best_effort_us if deadline_us is None else deadline_us
        left_s = (due_us - now_us) // _SECOND_US
        later_us = self._later(tracked, left_s)
        for part in self._of(request):
            price, pool = part.price, part.pool
            left_us = _left_us(tracked, price)
            part.due[left_s] += part.share * left_us
            left_us += later_us
            pool.requests += 1
            pool.waiting += request.model not in self._able
            if deadline_us is not None:
                pool.with_deadline += 1
                if now_us + left_us / price.widest > deadline_us:
                    whole_us = price.whole_us(request.steps) + later_us
                    pool.late += tracked.arrived_us + whole_us / price.widest <= deadline_us

    def _of(self, request: Request) -> list[_Part]:
        """The kinds that serve a request, worked out once for its model and shape."""
        key = (request.model, request.shape, request.workflow)
        known = self._parts.get(key)
        if known is None:
            known = self._parts[key] = []
            for gpu, share in self._shares(request):
                pool = self._pool(request.model, gpu)
                due: defaultdict[int, float] = self._due.setdefault(id(pool), defaultdict(float))
                known.append(_Part(share, self._price(request, gpu), pool, due))
        return known

    def _later(self, tracked: Tracked, left_s: int) -> int:
        """Enters the passes behind the one that a request is in; what they take, on the first kind
        of GPU of each, in microseconds.
        """
        whole_us = 0
        for leg in tracked.legs[tracked.workflow.at + 1 :]:
            parts = self._of(leg)
            for part in parts:
                part.due[left_s] += part.share * part.price.whole_us(leg.steps)
            whole_us += parts[0].price.whole_us(leg.steps)
        return whole_us

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
        ledger, workflow = self._ledger, self._ledger.workflow(request)

        def call_us(node: str) -> int:
            return ledger.predict(request, node, 1, (gpu,)).mean_us

        return _Price(
            sum(call_us(node) for node in workflow.before),
            call_us(workflow.stepped),
            sum(call_us(node) for node in workflow.after),
            max(ledger.cluster.degrees(request.model), default=1),
        )


def _left_us(tracked: Tracked, price: _Price) -> int:
    steps = max(0, tracked.request.steps - tracked.steps_done)
    before_us = 0 if tracked.prepared else price.before
    return before_us + steps * price.step + price.after
