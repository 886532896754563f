"""The simulator's loop: simulated time and workers around the one real scheduler.

    earliest of (next happening, scheduler's wake)  ──▶  observe all facts of that instant
                                                   ──▶  plan, if due or at the wake  ──▶ workers

`workers.py` says what happens to a plan, `costs.py` what that costs, `invariants.py` what must hold
all along. The loop reads no clock: who wants to know what plans cost passes a timer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from control.scheduler.books.commitments import PromiseFigures
from control.scheduler.core import Scheduler
from control.scheduler.facts import in_order
from control.scheduler.resilience.failures import OUT_OF_MEMORY
from control.scheduler.schedule_log import ScheduleLog
from control.scheduler.summary import Summary, summarise
from control.scheduler.values import (
    Arrived,
    CancelRequested,
    DrainRequested,
    Ended,
    Event,
    Outcome,
    Plan,
    WorkerLost,
    WorkerUp,
)

from .case import Case, FaultSpec
from .invariants import Checker, InvariantError
from .workers import GROUP_BROKEN, Workers

Timer = Callable[[], int]  # nanoseconds since some origin
BROKEN = {"fail": GROUP_BROKEN, "error": "MODEL_ERROR", "memory": OUT_OF_MEMORY}  # faults, reasons
PLANS_A_CENSUS = 256  # so often the requests inside are counted
PLANS_AN_INSTANT = 10_000  # more than that without time going on: the run will never end


@dataclass(slots=True)
class Result:
    """What a run did. `plans` and `facts` stay empty where nobody wanted them kept."""

    log: ScheduleLog
    plans: list[Plan] = field(default_factory=list)
    facts: list[Event] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # at the door
    promises: PromiseFigures | None = None  # where newcomers were told something
    plan_count: int = 0
    plan_ms: list[float] = field(default_factory=list)  # wall time of each plan, with a timer
    operations: list[int] = field(default_factory=list)  # of each plan, where the planner counts

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(p.digest for p in self.plans)

    @property
    def summary(self) -> Summary:
        return summarise(self.log, self.plan_ms)


def run(case: Case, *, timer: Timer | None = None, check: bool = True, keep: bool = True) -> Result:
    """Runs a Case to its end: until nothing can happen any more.

    Raises:
        InvariantError: with `check`, as soon as something happened that must not.
    """
    loop = Loop(case, timer=timer, check=check, keep=keep)
    loop.run()
    return loop.result


class Loop:
    """One run, instant by instant."""

    def __init__(
        self, case: Case, *, timer: Timer | None = None, check: bool = True, keep: bool = True
    ) -> None:
        profile = case.profile
        self.scheduler = Scheduler(case.settings, profile, case.loads)
        self.result = Result(ScheduleLog(0))
        self.now_us = 0
        self._case = case
        self._timer = timer
        self._keep = keep
        self._checker = _checker(case) if check else None
        self._workers = Workers(profile, case, self._checker)
        self._coming: list[tuple[int, int, Event | FaultSpec]] = []
        happenings: list[Event | FaultSpec] = [*case.cluster.leases(0, case.loads), *case.faults]
        happenings += [Arrived(at_us=t.arrival_us, request=t.to_request()) for t in case.trace]
        self._added = 0  # breaks ties: what was added first happens first
        for happening in happenings:
            self.add(happening)
        self._wake_us: int | None = None
        self._planned_us = (-1, 0)  # the last plan's instant, and how many plans it had

    def add(self, happening: Event | FaultSpec) -> None:
        """Something more that will happen, not before now."""
        assert happening.at_us >= self.now_us
        self._added += 1
        heapq.heappush(self._coming, (happening.at_us, self._added, happening))

    def run(self) -> None:
        """To the end. Raises: InvariantError."""
        while self.instant():
            pass
        if self._case.promises is not None:
            self.result.promises = self.scheduler.promise_figures()
        if self._checker:
            self._checker.inside((j.request for j in self.scheduler.jobs()), self.now_us)

    def next_us(self) -> int | None:
        """When something happens next; None: never."""
        coming_us = self._coming[0][0] if self._coming else None
        times = (self._workers.next_us(), self._wake_us, coming_us)
        return min((t for t in times if t is not None), default=None)

    def instant(self) -> bool:
        """All that happens at the next instant; false when nothing is left to happen."""
        coming, workers, scheduler = self._coming, self._workers, self.scheduler
        at_us = self.next_us()
        if at_us is None:
            return False
        now_us = self.now_us = max(self.now_us, at_us)
        new: list[Event] = list(workers.ended(now_us))
        while coming and coming[0][0] <= now_us:
            new += self._happen(heapq.heappop(coming)[2])
        if len(new) > 1:
            new = in_order(new)
        for fact in new:
            if isinstance(fact, Arrived) and self._case.promises is not None:
                self._admit(fact)
            else:
                self._observe(fact)
        if new and not scheduler.due(now_us):
            self._wake_us = scheduler.wake_us()
        if scheduler.due(now_us) or (self._wake_us is not None and now_us >= self._wake_us):
            self._plan(now_us)
            self._wake_us = scheduler.wake_us()
        workers.start(now_us)
        return True

    def _admit(self, fact: Arrived) -> None:
        """Tells the newcomer its finish, as control does; who is late may be refused."""
        promises = self._case.promises
        assert promises is not None
        request = msgspec.structs.replace(fact.request, firm=promises.is_firm(fact.request.id))
        (told,) = self.scheduler.forecast((request,), fact.at_us)
        deadline_us = request.deadline_us
        finish_us = told.finish_us_p95 if request.firm else told.finish_us
        on_time = deadline_us is None or finish_us <= deadline_us
        if request.firm and not on_time and promises.refuse:
            self.result.log.rejected(request.id, fact.at_us, "DEADLINE_UNATTAINABLE")
            self.result.refused.append(request.id)
            if self._checker:
                self._checker.ended(
                    Ended(
                        request=request.id,
                        outcome=Outcome.REJECTED,
                        at_us=fact.at_us,
                        on_time=False,
                        steps_done=0,
                    )
                )
            return
        self._observe(
            msgspec.structs.replace(
                fact, request=request, promised_us=told.finish_us, on_time=on_time
            )
        )

    def _observe(self, fact: Event) -> None:
        over = self.scheduler.observe(fact)
        result = self.result
        result.log.observed(fact, over)
        if self._keep:
            result.facts.append(fact)
        if over:
            result.ended += over
            if self._checker:
                for end in over:
                    self._checker.ended(end)

    def _plan(self, now_us: int) -> None:
        timer, result = self._timer, self.result
        begin_ns = timer() if timer else 0
        plan = self.scheduler.plan(now_us)
        if timer:
            result.plan_ms.append((timer() - begin_ns) / 1e6)
        result.operations.append(self.scheduler.operations)
        result.plan_count += 1
        result.log.planned(plan)
        if self._keep:
            result.plans.append(plan)
        if self._checker:
            self._checker.planned(plan)
        for end in plan.ended:
            result.log.ended(end)
            result.ended.append(end)
            if self._checker:
                self._checker.ended(end)
        if self._checker and result.plan_count % PLANS_A_CENSUS == 0:
            self._checker.inside((j.request for j in self.scheduler.jobs()), now_us)
        self._workers.receive(plan)
        count = self._planned_us[1] + 1 if self._planned_us[0] == now_us else 1
        self._planned_us = (now_us, count)
        if count > PLANS_AN_INSTANT:
            raise InvariantError("time-goes-on", "scheduler", now_us, f"{count} plans at once")

    def _happen(self, happening: Event | FaultSpec) -> list[Event]:
        """Lets something happen to the workers; returns the facts that control learns."""
        workers = self._workers
        if isinstance(happening, FaultSpec):
            if (reason := BROKEN.get(happening.kind)) is not None:
                return list(workers.fail(happening.at_us, happening.worker, reason))
            happening = _fact(workers, happening)
        match happening:
            case Arrived():
                workers.requests[happening.request.id] = happening.request
                if self._checker:
                    self._checker.arrived(happening.request, happening.at_us)
            case WorkerLost():
                workers.lose(happening.worker)
            case WorkerUp():
                incarnation = int(happening.incarnation)
                if incarnation != workers.incarnations.get(happening.worker, 0):
                    workers.lose(happening.worker)
                    workers.join(happening.worker, incarnation)
                workers.fetches.told[happening.worker] = happening
            case _:
                pass
        return [happening]


def _checker(case: Case) -> Checker:
    """Knows the weights of every part that a model of the cluster can be made of."""
    loads, gpu = case.loads, case.cluster.gpu
    parts = {
        (model.name, named.node): frozenset(p for p in named.parts if loads.weights(p, gpu).mib)
        for model in case.cluster.served(loads)
        for named in model.parts
    }
    return Checker(
        memory_mib=case.cluster.memory_mib if loads else 0,
        weights_mib={p: loads.weights(p, gpu).mib for each in parts.values() for p in each},
        parts=parts,
    )


def _fact(workers: Workers, fault: FaultSpec) -> Event:
    if fault.kind == "lost":
        return WorkerLost(at_us=fault.at_us, worker=fault.worker)
    if fault.kind in ("drain", "undrain"):
        draining = fault.kind == "drain"
        return DrainRequested(at_us=fault.at_us, worker=fault.worker, draining=draining)
    if fault.kind == "cancel":
        return CancelRequested(at_us=fault.at_us, request=fault.request)
    lives = workers.lives(fault.worker)
    count = workers.incarnations.get(fault.worker, 0) + (fault.kind == "up" or not lives)
    cluster = workers.case.cluster
    return WorkerUp(
        at_us=fault.at_us,
        worker=fault.worker,
        incarnation=str(count),
        gpu=cluster.gpu,
        host=fault.host,
        models=cluster.served(workers.case.loads),
        memory_mib=cluster.memory_mib,
    )
