"""The simulated cluster: queues, latents, weights, and steps under way.

A worker runs its assignments in sequence order. One starts as soon as it is at the head of all its
members' queues and a named holder has the latent of each job; first come loads, transfers and the
group, then its steps, each in the profile's time (times noise, times the slowest straggler).

    worker a   [load][change][cold][ step ][ step ][ step ]▶ report
    worker b         └ the same interval for all members ┘    (later by `report_delay_us`)

Nothing here is looked for: each worker knows its head, each request its runs, and only heads that
something happened to are asked whether they can start.
"""

from __future__ import annotations

import heapq
from collections import deque

import msgspec

from control.scheduler.resilience.failures import LATENT_MISSING
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    TEXT,
    VAE,
    Assignment,
    AssignmentFailed,
    JobProgress,
    Load,
    Member,
    Plan,
    Request,
    StepsEnded,
    Truncation,
    WorkerUp,
)

from .call_times import CallTimes
from .case import Case
from .costs import StepTimes
from .fetches import Fetches
from .invariants import Checker
from .running import RunningAssignment

Fact = StepsEnded | AssignmentFailed | WorkerUp
GROUP_BROKEN = "GROUP_BROKEN"


class Workers:
    """All workers of a run; knows their truth, of which control learns by reports."""

    def __init__(self, profile: Profile, case: Case, checker: Checker | None = None) -> None:
        self.case = case
        self.requests: dict[str, Request] = {}
        self.incarnations: dict[str, int] = {}
        self._checker = checker
        self._calls = CallTimes(
            profile, case.cluster.gpu, case.settings, case.contention, case.cluster.kinds()
        )
        self._times = StepTimes(case.costs, case.stragglers, case.seed)
        self._queues: dict[str, deque[RunningAssignment]] = {}
        self._latents: dict[str, dict[str, int]] = {}  # request -> worker -> steps
        self._ran: dict[str, frozenset[str]] = {}  # request -> workers of its last run
        self._runs: dict[str, list[RunningAssignment]] = {}  # request -> not over yet
        # Request -> at the head, without its latent.
        self._waiting: dict[str, list[RunningAssignment]] = {}
        self._touched: dict[str, None] = {}  # workers with another head than before
        self._formed: set[tuple[int, tuple[str, ...]]] = set()
        self._loads: dict[int, list[Load]] = {}  # by sequence
        self._owed: dict[str, list[Load]] = {}  # worker -> loads of assignments that were dropped
        self._step_ends: list[tuple[int, int, RunningAssignment]] = []  # heap
        self._reports: deque[tuple[int, Fact]] = deque()  # under way
        self.fetches = Fetches(case.costs.group_change_us)

    # -------------------------------------------------------------------------------- the loop's

    def receive(self, plan: Plan) -> None:
        """Takes a plan in: truncations first, then assignments behind what is queued."""
        for truncation in plan.truncations:
            self._truncate(truncation)
        for request in plan.released:
            self._release(request)
        self.fetches.go(plan)
        for load in plan.loads:
            self._loads.setdefault(load.sequence, []).append(load)
        for assignment in plan.assignments:
            first = self.requests[assignment.batch[0].request]
            running = RunningAssignment(assignment, self._calls.of(assignment, first))
            for member in assignment.batch:
                self._runs.setdefault(member.request, []).append(running)
            for worker in assignment.workers:
                self._queues[worker].append(running)
                self._touched[worker] = None

    def start(self, now_us: int) -> None:
        """Starts whatever can start; a start never enables another."""
        if not self._touched:
            return
        touched, self._touched = self._touched, {}
        for worker in touched:
            running = self._head(worker)
            if running is None or running.started or not self._first(running):
                continue
            missing = self._missing(running)
            if missing is None:
                self._start(now_us, running)
            elif not any(r is not running for r in self._runs.get(missing.request, ())):
                self._give_up(now_us, running, missing)  # nobody is at work on that latent

    def next_us(self) -> int | None:
        """When a step ends next, or a report comes in."""
        ends = self._step_ends
        while ends and ends[0][2].over:
            heapq.heappop(ends)
        step_us = ends[0][0] if ends else None
        report_us = self._reports[0][0] if self._reports else None
        times = (step_us, report_us, self.fetches.next_us())
        return min((us for us in times if us is not None), default=None)

    def ended(self, now_us: int) -> list[Fact]:
        """Lets steps end that end now; returns the reports that come in now."""
        ends = self._step_ends
        delay_us = self.case.costs.report_delay_us
        facts: list[Fact] = []
        while ends and ends[0][0] <= now_us:
            running = heapq.heappop(ends)[2]
            if running.over:
                continue
            fact = self._step_ended(now_us, running)
            if fact is not None:
                self._send(now_us + delay_us, fact, facts)
        while self._reports and self._reports[0][0] <= now_us:
            facts.append(self._reports.popleft()[1])
        facts += self.fetches.come(now_us, self._latents, self._queues)
        return facts

    # -------------------------------------------------------------------------------- faults

    def lives(self, worker: str) -> bool:
        return worker in self._queues

    def join(self, worker: str, incarnation: int) -> None:
        """A worker comes up, with nothing."""
        self._queues[worker] = deque()
        self.incarnations[worker] = incarnation
        if self._checker:
            self._checker.worker_up(worker)

    def lose(self, worker: str) -> None:
        """A worker dies: what it ran with others dies with it, its latents are gone."""
        for running in self._queues.pop(worker, ()):
            self._drop(running)
        self._owed.pop(worker, None)
        for copies in self._latents.values():
            copies.pop(worker, None)
        for request in list(self._waiting):
            self._ask_again(request)
        for request, members in self._ran.items():
            if worker in members:
                self._ran[request] = members - {worker}
        if self._checker:
            self._checker.worker_lost(worker)

    def fail(self, now_us: int, worker: str, reason: str) -> list[Fact]:
        """Breaks what a worker runs; of a broken group all the others report, and accuse it."""
        running = self._head(worker) if worker in self._queues else None
        if running is None or not running.started:
            return []
        a = running.assignment
        self._drop(running)
        facts: list[Fact] = []
        broken = reason == GROUP_BROKEN
        others = [w for w in a.workers if w != worker] if broken else []
        at_us = now_us + self.case.costs.report_delay_us
        for reporter in others or [worker]:
            fact = self._failure(at_us, a, reporter, reason, (worker,) if broken else ())
            self._send(at_us, fact, facts)
        return facts

    def _send(self, at_us: int, fact: Fact, now: list[Fact]) -> None:
        """All reports take the same time, so those under way come in in the order they went."""
        if self.case.costs.report_delay_us:
            self._reports.append((at_us, fact))
        else:
            now.append(fact)

    def _copies(self, a: Assignment, worker: str) -> tuple[JobProgress, ...]:
        held = [(m, self._latents.get(m.request, {}).get(worker)) for m in a.batch]
        return tuple(
            JobProgress(request=m.request, attempt=m.attempt, steps_done=done)
            for m, done in held
            if done is not None
        )

    # -------------------------------------------------------------------------------- steps

    def _head(self, worker: str) -> RunningAssignment | None:
        queue = self._queues.get(worker)
        while queue and queue[0].over:
            queue.popleft()
        return queue[0] if queue else None

    def _first(self, running: RunningAssignment) -> bool:
        """At the head of all its members' queues."""
        return all(self._head(worker) is running for worker in running.assignment.workers)

    def _missing(self, running: RunningAssignment) -> Member | None:
        """The first job whose latent nobody named has as far as is needed; it is waited for."""
        a = running.assignment
        if a.node == TEXT:
            return None
        for member in a.batch:
            copies = self._latents.get(member.request, {})
            if not any(copies.get(h.worker) == h.steps_done for h in member.holders):
                waiting = self._waiting.setdefault(member.request, [])
                if running not in waiting:
                    waiting.append(running)
                return member
        return None

    def _give_up(self, now_us: int, running: RunningAssignment, missing: Member) -> None:
        """Control believed in a latent that is not there; the first member says so."""
        a = running.assignment
        self._drop(running)
        at_us = now_us + max(1, self.case.costs.report_delay_us)
        fact = self._failure(at_us, a, a.workers[0], LATENT_MISSING, ())
        tried = tuple(h.worker for h in missing.holders)
        named = msgspec.structs.replace(fact, request=missing.request, tried=tried)
        self._reports.append((at_us, named))

    def _failure(
        self, at_us: int, a: Assignment, reporter: str, reason: str, suspects: tuple[str, ...]
    ) -> AssignmentFailed:
        return AssignmentFailed(
            at_us=at_us,
            sequence=a.sequence,
            worker=reporter,
            jobs=self._copies(a, reporter),
            reason=reason,
            suspects=suspects,
        )

    def _start(self, now_us: int, running: RunningAssignment) -> None:
        a = running.assignment
        running.started = True
        running.setup_us = (self._load(a, now_us), self._change_us(a), self._cold_us(a))
        if self._checker:
            self._checker.started(a, now_us)
        running.reported_us = now_us + sum(running.setup_us)
        self._step(running.reported_us, running)

    def _load(self, a: Assignment, now_us: int) -> int:
        """Members load side by side, each what it owes and what this assignment needs."""
        loads = self._loads.pop(a.sequence, [])
        if self._owed:
            loads = [x for w in a.workers for x in self._owed.pop(w, ())] + loads
        if not loads:
            return 0
        each: dict[str, int] = {}
        for load in loads:
            each[load.worker] = each.get(load.worker, 0) + load.load_us
            if self._checker:
                self._checker.loaded(load, now_us)
        return max(each.values())

    def _change_us(self, a: Assignment) -> int:
        change_us = self.case.costs.group_change_us
        if not change_us or a.node == TEXT:
            return 0
        for member in a.batch:
            before = self._ran.get(member.request, frozenset())
            stays = a.workers[0] in before if a.node == VAE else before == frozenset(a.workers)
            if not stays:
                return change_us
        return 0

    def _cold_us(self, a: Assignment) -> int:
        group = (a.epoch, a.workers)
        if len(a.workers) == 1 or group in self._formed:
            return 0
        self._formed.add(group)
        return self.case.costs.group_cold_us

    def _step(self, begin_us: int, running: RunningAssignment) -> None:
        a, made = running.assignment, running.steps_done
        call_us = running.call_us[self._calls.differ and self._beside(a)]
        step_us, running.own_us = self._times.of(a, made, call_us, begin_us)
        running.step_us = step_us
        end_us = begin_us + step_us
        heapq.heappush(self._step_ends, (end_us, running.assignment.sequence, running))

    def _beside(self, a: Assignment) -> bool:
        """Another worker computes, too."""
        heads = [self._head(w) for w in self._queues if w not in a.workers]
        return any(head is not None and head.started for head in heads)

    def _step_ended(self, now_us: int, running: RunningAssignment) -> StepsEnded | None:
        a = running.assignment
        running.steps_done += 1
        running.unreported.append(running.step_us)
        running.unreported_own += running.own_us
        for member in a.batch:
            if (copies := self._latents.get(member.request)) is None:
                copies = self._latents[member.request] = {}
            done = running.progress(member).steps_done
            for worker in a.workers:
                copies[worker] = done
            self._ask_again(member.request)
        if self._checker:
            self._checker.stepped(a, running.steps_done, now_us)
        for member in running.leaving:
            self._runs[member.request].remove(running)
        running.part()
        last = running.stops()
        if running.steps_done == 1:
            members = frozenset(a.workers)
            for member in a.batch:
                self._ran[member.request] = members
        if last:
            self._over(running)
        else:
            self._step(now_us, running)
        if not last and now_us - running.reported_us < self.case.costs.report_us:
            return None
        return self._report(now_us, running, last)

    def _report(self, now_us: int, running: RunningAssignment, last: bool) -> StepsEnded:
        a = running.assignment
        times, running.unreported = tuple(running.unreported), []
        own, running.unreported_own = tuple(running.unreported_own), []
        (load_us, transfer_us, group_us), running.setup_us = running.setup_us, (0, 0, 0)
        running.reported_us = now_us
        left, running.left = tuple(running.left), []
        return StepsEnded(
            at_us=now_us + self.case.costs.report_delay_us,
            sequence=a.sequence,
            jobs=(*(running.progress(m) for m in a.batch), *left),
            step_time_us=times,
            last=last,
            group_time_us=group_us,
            transfer_time_us=transfer_us,
            load_time_us=load_us,
            member_time_us=own,
        )

    # -------------------------------------------------------------------------------- ends

    def _over(self, running: RunningAssignment) -> None:
        """Takes a run out of everybody's hands; queues are cleared when their heads are asked."""
        running.over = True
        a = running.assignment
        for worker in a.workers:
            self._touched[worker] = None
        for member in a.batch:
            runs = self._runs.get(member.request)
            if runs is not None:
                runs.remove(running)
            self._ask_again(member.request)
        if self._checker:
            self._checker.released(a)

    def _ask_again(self, request: str) -> None:
        """What waits for the latent of a request may start now, or never."""
        for waiting in self._waiting.pop(request, ()):
            self._touched.update(dict.fromkeys(waiting.assignment.workers))

    def _drop(self, running: RunningAssignment) -> None:
        """Ends a run early; its loads stay due, for control counts on them."""
        if running.over:
            return
        for load in self._loads.pop(running.assignment.sequence, ()):
            if load.worker in self._queues:
                self._owed.setdefault(load.worker, []).append(load)
        self._over(running)

    def _truncate(self, truncation: Truncation) -> None:
        for running in list(self._runs.get(truncation.request, ())):
            a = running.assignment
            member = next(m for m in a.batch if m.request == truncation.request)
            if member.attempt > truncation.attempt:
                continue
            if running.leave(member):
                if not running.started:
                    self._runs[member.request].remove(running)
                    self._touched.update(dict.fromkeys(a.workers))
            elif running.started or member.first_step < truncation.stop_at_step:
                running.stop_at = truncation.stop_at_step
            else:
                self._drop(running)
        if truncation.release:
            self._release(truncation.request)

    def _release(self, request: str) -> None:
        self._latents.pop(request, None)
        self._ran.pop(request, None)
        self._waiting.pop(request, None)
        if not self._runs.get(request):
            self._runs.pop(request, None)
