"""The simulator's loop: simulated time and workers around the one real scheduler.

    earliest of (next happening, scheduler's wake)  ──▶  observe all facts of that instant
                                                   ──▶  plan, if due or at the wake  ──▶ workers

A worker runs its assignments in sequence order. One starts as soon as it is at the head of all its
members' queues, they are idle and a named holder has the latent; each step takes the profile's
time, and its end is a fact. Transfers and group creation cost nothing here.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from control.scheduler.core import Scheduler
from control.scheduler.facts import in_order
from control.scheduler.latency import estimate_us
from control.scheduler.profile import CellKey, Profile
from control.scheduler.schedule_log import ScheduleLog
from control.scheduler.summary import Summary, summarise
from control.scheduler.values import (
    DIT,
    TEXT,
    Arrived,
    Assignment,
    AssignmentFailed,
    CancelRequested,
    DrainRequested,
    Ended,
    Event,
    JobProgress,
    Member,
    Plan,
    Request,
    StepsEnded,
    Truncation,
    WorkerLost,
    WorkerUp,
)

from .case import Case, Fault


@dataclass(slots=True)
class Running:
    """An assignment in the workers' hands."""

    assignment: Assignment
    step_us: int
    started: bool = False
    stopping: bool = False
    steps_done: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did."""

    plans: tuple[Plan, ...]
    facts: tuple[Event, ...]
    ended: tuple[Ended, ...]
    log: ScheduleLog

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(p.digest for p in self.plans)

    @property
    def summary(self) -> Summary:
        return summarise(self.log)


@dataclass(slots=True)
class Workers:
    """The simulated cluster: queues, latents, steps under way."""

    profile: Profile
    case: Case
    requests: dict[str, Request] = field(default_factory=dict)
    incarnations: dict[str, int] = field(default_factory=dict)
    queues: dict[str, list[Running]] = field(default_factory=dict)
    latents: dict[str, dict[str, int]] = field(default_factory=dict)  # request -> worker -> steps
    step_ends: list[tuple[int, int, Running]] = field(default_factory=list)  # heap

    def receive(self, plan: Plan) -> None:
        """Takes a plan in: truncations first, then assignments behind what is queued."""
        for truncation in plan.truncations:
            self._truncate(truncation)
        for request in plan.released:
            self.latents.pop(request, None)
        for assignment in plan.assignments:
            running = Running(assignment, self._step_us(assignment))
            for worker in assignment.workers:
                self.queues[worker].append(running)

    def start(self, now_us: int) -> None:
        """Starts whatever can start; a start never enables another."""
        for worker in sorted(self.queues):
            queue = self.queues[worker]
            if queue and self._ready(queue[0]):
                queue[0].started = True
                self._push(now_us, queue[0])

    def next_us(self) -> int | None:
        """End of the next step."""
        while self.step_ends and not self._live(self.step_ends[0][2]):
            heapq.heappop(self.step_ends)
        return self.step_ends[0][0] if self.step_ends else None

    def ended(self, now_us: int) -> list[Event]:
        """Facts of the steps that end now."""
        facts: list[Event] = []
        while self.next_us() == now_us:
            running = heapq.heappop(self.step_ends)[2]
            facts.append(self._step_ended(now_us, running))
        return facts

    def lose(self, worker: str) -> None:
        """A worker dies: what it ran with others dies with it, its latents are gone."""
        for running in list(self.queues.pop(worker, [])):
            for other in running.assignment.workers:
                if running in self.queues.get(other, []):
                    self.queues[other].remove(running)
        for copies in self.latents.values():
            copies.pop(worker, None)

    def incarnation(self, worker: str) -> str:
        return str(self.incarnations.get(worker, 0))

    def fail(self, now_us: int, worker: str) -> list[Event]:
        """Breaks what a worker runs with others: each member reports, all but itself accuse it."""
        queue = self.queues.get(worker, [])
        if not queue or not queue[0].started:
            return []
        running = queue[0]
        a = running.assignment
        for member in a.workers:
            self.queues[member].remove(running)
        return [
            AssignmentFailed(
                at_us=now_us,
                sequence=a.sequence,
                worker=reporter,
                jobs=tuple(self._progress(m, reporter) for m in a.batch if self._has(m, reporter)),
                reason="GROUP_BROKEN",
                suspects=(worker,),
            )
            for reporter in a.workers
            if reporter != worker or len(a.workers) == 1
        ]

    def _has(self, member: Member, worker: str) -> bool:
        return worker in self.latents.get(member.request, {})

    def _progress(self, member: Member, worker: str) -> JobProgress:
        done = self.latents[member.request][worker]
        return JobProgress(request=member.request, attempt=member.attempt, steps_done=done)

    def _step_ended(self, now_us: int, running: Running) -> StepsEnded:
        a = running.assignment
        running.steps_done += 1
        last = running.stopping or running.steps_done == a.steps
        jobs: list[JobProgress] = []
        for member in a.batch:
            done = member.first_step + (running.steps_done if a.node == DIT else 0)
            jobs.append(
                JobProgress(request=member.request, attempt=member.attempt, steps_done=done)
            )
            copies = self.latents.setdefault(member.request, {})
            copies.update({w: done for w in a.workers})
        if last:
            for worker in a.workers:
                self.queues[worker].remove(running)
        else:
            self._push(now_us, running)
        return StepsEnded(
            at_us=now_us,
            sequence=a.sequence,
            jobs=tuple(jobs),
            step_time_us=(running.step_us,),
            last=last,
        )

    def _push(self, now_us: int, running: Running) -> None:
        end_us = now_us + running.step_us
        heapq.heappush(self.step_ends, (end_us, running.assignment.sequence, running))

    def _live(self, running: Running) -> bool:
        return any(running in self.queues.get(w, []) for w in running.assignment.workers)

    def _ready(self, running: Running) -> bool:
        a = running.assignment
        if running.started or any(self.queues[w][0] is not running for w in a.workers):
            return False
        if a.node == TEXT:
            return True
        return all(
            any(self.latents[m.request].get(h.worker) == h.steps_done for h in m.holders)
            for m in a.batch
            if m.request in self.latents
        ) and all(m.request in self.latents for m in a.batch)

    def _truncate(self, truncation: Truncation) -> None:
        for queue in self.queues.values():
            for running in list(queue):
                batch = running.assignment.batch
                if not any(
                    m.request == truncation.request and m.attempt <= truncation.attempt
                    for m in batch
                ):
                    continue
                if running.started:
                    running.stopping = True
                else:
                    queue.remove(running)
        if truncation.release:
            self.latents.pop(truncation.request, None)

    def _step_us(self, a: Assignment) -> int:
        request = self.requests[a.batch[0].request]
        gpu = self.case.cluster.gpu
        key = CellKey(request.model, gpu, a.node, request.shape, a.layout, len(a.batch))
        return max(1, round(estimate_us(self.profile, key, self.case.settings)))


def run(case: Case) -> Result:
    """Runs a Case to its end: until nothing can happen any more."""
    profile = case.profile
    scheduler = Scheduler(case.settings, profile)
    workers = Workers(profile, case)
    log = ScheduleLog(0)
    coming: list[tuple[int, int, Event | Fault]] = []
    happenings: list[Event | Fault] = [*case.cluster.leases(0), *case.faults]
    happenings += [Arrived(at_us=t.arrival_us, request=t.to_request()) for t in case.trace]
    for i, happening in enumerate(happenings):
        heapq.heappush(coming, (happening.at_us, i, happening))
    plans: list[Plan] = []
    facts: list[Event] = []
    ended: list[Ended] = []
    now_us = 0
    while True:
        times = [workers.next_us(), scheduler.wake_us(), coming[0][0] if coming else None]
        if all(t is None for t in times):
            break
        now_us = max(now_us, min(t for t in times if t is not None))
        new = workers.ended(now_us)
        while coming and coming[0][0] == now_us:
            new += _happen(workers, heapq.heappop(coming)[2])
        for fact in in_order(new):
            over = scheduler.observe(fact)
            log.observed(fact, over)
            facts.append(fact)
            ended += over
        wake_us = scheduler.wake_us()
        if scheduler.due(now_us) or (wake_us is not None and now_us >= wake_us):
            plan = scheduler.plan(now_us)
            log.planned(plan)
            plans.append(plan)
            workers.receive(plan)
        workers.start(now_us)
    return Result(tuple(plans), tuple(facts), tuple(ended), log)


def _happen(workers: Workers, happening: Event | Fault) -> list[Event]:
    """Lets something happen to the workers; returns the facts that control learns."""
    if isinstance(happening, Fault):
        if happening.kind == "fail":
            return workers.fail(happening.at_us, happening.worker)
        happening = _fact(workers, happening)
    match happening:
        case Arrived():
            workers.requests[happening.request.id] = happening.request
        case WorkerLost():
            workers.lose(happening.worker)
        case WorkerUp() if happening.incarnation != workers.incarnation(happening.worker):
            workers.lose(happening.worker)
            workers.queues[happening.worker] = []
            workers.incarnations[happening.worker] = int(happening.incarnation)
        case _:
            pass
    return [happening]


def _fact(workers: Workers, fault: Fault) -> Event:
    if fault.kind == "lost":
        return WorkerLost(at_us=fault.at_us, worker=fault.worker)
    if fault.kind == "drain":
        return DrainRequested(at_us=fault.at_us, worker=fault.worker)
    if fault.kind == "cancel":
        return CancelRequested(at_us=fault.at_us, request=fault.request)
    lives = fault.worker in workers.queues
    count = workers.incarnations.get(fault.worker, 0) + (fault.kind == "up" or not lives)
    return WorkerUp(
        at_us=fault.at_us,
        worker=fault.worker,
        incarnation=str(count),
        gpu=workers.case.cluster.gpu,
        host=fault.host,
        models=workers.case.cluster.models,
    )
