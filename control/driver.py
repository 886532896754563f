"""The live driver: shows the scheduler every fact, once, in order, and carries its plans to the
workers.

    facts (reports, arrivals, leases) ──▶ inbox ──▶ turn: observe … observe ──▶ due? round near? ──▶
    plan ──▶ outlet

It decides nothing: when to plan is the scheduler's own answer (`due`, `wake_us`), and the simulator
asks it the same way. Facts are stamped when they enter the inbox, and everything that waits there
is observed before a plan is asked for, so that a fact stamped at a boundary belongs to the next
round. Turns run where planning runs (control/planning.py): facts that come meanwhile gather, and
one plan follows for all of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from control.planning import Inline, Planning
from control.scheduler import values
from control.scheduler.core import Scheduler
from control.scheduler.facts import in_order
from control.scheduler.workflow import Workflow
from hocket.clock import Clock

T = TypeVar("T")

INBOX_MAX = 65_536  # facts; beyond it what a later fact repeats is dropped, and counted
_REST_US_MAX = 20_000  # between two plans, where they take long
_LONG_US = 1_000  # a plan of a long queue. In a flood of newcomers it gives way to their forecasts
_FLOOD, _FLOOD_US = 48, 250_000  # so many in so long, that long ago at most
# Workers may be idle meanwhile; not longer than what was committed to them lasts, as a rule.
_RESTS_FLOODED, _REST_FLOODED_US_MAX = 4, 100_000


@dataclass(frozen=True, slots=True)
class Posted:
    """A fact on its way to the scheduler."""

    fact: values.Event
    note: object = None  # handed back when the fact was observed; nobody here looks into it
    estimate: Collection[str] = ()  # requests whose finish shall be estimated then
    unless: Callable[[Scheduler], bool] | None = None  # it is no news then
    workflow: Workflow | None = None  # that a request which arrives names


@dataclass(frozen=True, slots=True)
class _Question:
    """Something asked of the scheduler once it has seen every fact posted before."""

    ask: Callable[[Scheduler], object]
    answer: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class Observed:
    """A fact that was shown to the scheduler."""

    fact: values.Event
    note: object
    ended: tuple[values.Ended, ...]  # by it
    counted: frozenset[str]  # requests of its jobs whose attempt is the present one


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of the scheduler led to."""

    observed: tuple[Observed, ...]
    finish_us: dict[str, int]  # estimates, by request
    plan: values.Plan | None
    digest: str  # of the plan: it takes milliseconds for a large one
    plan_time_us: int
    wake_us: int | None  # when to plan if no fact comes before
    answers: tuple[object, ...] = ()  # to what was asked behind the facts


class Outlet(Protocol):
    """Where the driver's results go (see publisher.py)."""

    async def turned(self, turn: Turn) -> None:
        """Facts were observed, perhaps a plan was made: journal it and tell whom it concerns."""


class Driver:
    """Owns the scheduler, and the one way to ask it."""

    def __init__(
        self, scheduler: Scheduler, clock: Clock, outlet: Outlet, planning: Planning | None = None
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._outlet = outlet
        self._planning = planning or Inline()
        self._inbox: list[Posted] = []
        self._questions: list[_Question] = []
        self._arrived = asyncio.Event()
        self._wake_us: int | None = None
        self._rest_until_us = 0
        self._newcomers, self._counted_from_us = 0, 0
        self._flooded_until_us = 0
        self._gives_way = False  # the last plan took long in a flood of newcomers
        self.drops: Counter[str] = Counter()  # facts that found the inbox full, by kind

    def post(
        self,
        fact: values.Event,
        note: object = None,
        *,
        estimate: Collection[str] = (),
        unless: Callable[[Scheduler], bool] | None = None,
        workflow: Workflow | None = None,
    ) -> None:
        """Queues a fact whose `at_us` came from `stamp` in this same step of the event loop.

        `unless` is asked when its turn has come: the fact is dropped if that says true. `workflow`
        is taught then: of those that no request inside uses, the scheduler keeps some only.
        """
        if len(self._inbox) >= INBOX_MAX and _is_repeated(fact, unless):
            self.drops[type(fact).__name__] += 1
            return
        self._inbox.append(Posted(fact, note, estimate, unless, workflow))
        self._arrived.set()

    def stamp(self) -> int:
        """Time for a fact that arrives now."""
        return self._clock.now_us()

    async def ask(self, question: Callable[[Scheduler], T], *, newcomers: int = 0) -> T:
        """The scheduler's answer; behind the turn under way, and without changing anything.

        `newcomers`: how many it is about.
        """
        answer = await self._planning.run(lambda: question(self._scheduler))
        now_us = self._clock.now_us()
        if now_us >= self._counted_from_us + _FLOOD_US:
            self._newcomers, self._counted_from_us = 0, now_us
        self._newcomers += newcomers
        if self._newcomers >= _FLOOD:
            self._flooded_until_us = now_us + _FLOOD_US
        return answer

    async def ask_behind(self, question: Callable[[Scheduler], T]) -> T:
        """The same, once every fact that was posted before has been shown."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._questions.append(_Question(question, answer))
        self._arrived.set()
        return await answer

    def awaits(self, worker: str) -> bool:
        """See `Scheduler.awaits`, which may be asked beside a plan."""
        return self._scheduler.awaits(worker)

    async def run(self) -> None:
        """Drives until cancelled."""
        while True:
            posted = await self._next_facts()
            questions, self._questions = self._questions, []
            now_us = self._clock.now_us()  # facts that come from here on have later stamps
            turn = await self._planning.run(partial(self._turn, posted, questions, now_us))
            self._wake_us = turn.wake_us
            for question, answer in zip(questions, turn.answers, strict=True):
                if not question.answer.done():
                    question.answer.set_result(answer)
            if turn.plan is not None:
                now_us, took_us = self._clock.now_us(), turn.plan_time_us
                self._gives_way = took_us > _LONG_US and now_us < self._flooded_until_us
                rest_us = min(took_us, _REST_US_MAX)
                if self._gives_way:
                    rest_us = min(_RESTS_FLOODED * took_us, _REST_FLOODED_US_MAX)
                self._rest_until_us = now_us + rest_us
            await self._outlet.turned(turn)

    def close(self) -> None:
        """Returns when the scheduler is at rest; call it after `run` has ended."""
        self._planning.close()

    def _turn(self, posted: Sequence[Posted], questions: Sequence[_Question], now_us: int) -> Turn:
        scheduler = self._scheduler
        observed = []
        for item in posted:
            if item.unless is not None and item.unless(scheduler):
                continue
            if item.workflow is not None:
                scheduler.learn(item.workflow)
            counted = _counted(scheduler, item.fact)
            ended = scheduler.observe(item.fact)
            observed.append(Observed(item.fact, item.note, ended, counted))
        finish_us = {}
        for request in dict.fromkeys(r for item in posted for r in item.estimate):
            estimated_us = scheduler.eta_us(request, now_us)
            if estimated_us is not None:
                finish_us[request] = estimated_us
        answers = tuple(question.ask(scheduler) for question in questions)
        plan, plan_time_us = None, 0
        wake_us = scheduler.wake_us()
        if scheduler.due(now_us) or (wake_us is not None and wake_us <= now_us):
            began_us = self._clock.now_us()
            plan = scheduler.plan(now_us)
            plan_time_us = self._clock.now_us() - began_us
            wake_us = scheduler.wake_us()
        digest = "" if plan is None else plan.digest
        told = tuple(observed)
        return Turn(told, finish_us, plan, digest, plan_time_us, wake_us, answers)

    async def _next_facts(self) -> list[Posted]:
        """All facts that wait, or none when the time for a plan comes first."""
        if not self._inbox and not self._questions:
            self._arrived.clear()
            await self._wait()
        rest_until_us = self._rest_until_us
        if self._wake_us is not None and not self._gives_way:  # as its wakes come one by one
            rest_until_us = min(rest_until_us, self._wake_us)
        if rest_until_us > self._clock.now_us():  # a plan took long: let more facts gather
            await self._clock.sleep_until(rest_until_us)
        await self._clock.settle()
        posted, self._inbox = self._inbox, []
        by_fact = {id(item.fact): item for item in posted}
        return [by_fact[id(fact)] for fact in in_order(item.fact for item in posted)]

    async def _wait(self) -> None:
        if self._wake_us is None:
            await self._arrived.wait()
            return
        wake = asyncio.ensure_future(self._wake_at(self._wake_us))
        try:
            await self._arrived.wait()
        finally:
            wake.cancel()

    async def _wake_at(self, at_us: int) -> None:
        await self._clock.sleep_until(at_us)
        self._arrived.set()


def _counted(scheduler: Scheduler, fact: values.Event) -> frozenset[str]:
    """Of a report's jobs those in their present attempt; others were called off."""
    if not isinstance(fact, values.StepsEnded | values.AssignmentFailed):
        return frozenset()
    views = ((job, scheduler.job(job.request)) for job in fact.jobs)
    return frozenset(
        j.request for j, view in views if view is not None and view.attempt == j.attempt
    )


def _is_repeated(fact: values.Event, unless: object) -> bool:
    """Whether a later fact will say as much."""
    return unless is not None or (isinstance(fact, values.StepsEnded) and not fact.last)
