"""The driver: facts gather while a plan is made, questions wait their turn, the loop goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from control import driver as driving
from control.driver import Driver, Turn
from control.planning import PlannerThread
from control.scheduler import values
from control.scheduler.books.catalogue import WORKFLOWS_MAX
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.workflow import CHAIN
from hocket.clock import ManualClock, SystemClock

WAIT_S = 30.0


class SlowScheduler:
    """Counts what is asked of it, on which thread; its first plan waits until it is let go."""

    def __init__(self) -> None:
        self.seen: list[values.Event] = []
        self.plans: list[int] = []
        self.threads: set[int] = set()
        self.planning = threading.Event()
        self.go = threading.Event()

    def observe(self, fact: values.Event) -> Sequence[values.Ended]:
        self.threads.add(threading.get_ident())
        self.seen.append(fact)
        return ()

    def plan(self, now_us: int) -> values.Plan:
        self.threads.add(threading.get_ident())
        self.plans.append(len(self.seen))
        self.planning.set()
        assert self.go.wait(WAIT_S)
        return values.Plan(round=len(self.plans), now_us=now_us, start_us=now_us)

    def due(self, now_us: int) -> bool:
        return bool(self.seen) and (not self.plans or self.plans[-1] < len(self.seen))

    def wake_us(self) -> int | None:
        return None

    def job(self, request: str) -> None:
        return None


class Turns:
    """An outlet that keeps what it is told."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.came = asyncio.Event()

    async def turned(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.came.set()


def lost(driver: Driver, worker: str) -> values.WorkerLost:
    return values.WorkerLost(at_us=driver.stamp(), worker=worker)


async def test_facts_that_come_while_a_plan_is_made_get_one_plan() -> None:
    scheduler, outlet = SlowScheduler(), Turns()
    driver = Driver(scheduler, SystemClock(), outlet, PlannerThread())  # type: ignore[arg-type]
    driven = asyncio.ensure_future(driver.run())
    async with asyncio.timeout(WAIT_S):
        driver.post(lost(driver, "w0"))
        await asyncio.to_thread(scheduler.planning.wait, WAIT_S)
        for number in range(100):  # the loop is free: the plan waits in its thread
            driver.post(lost(driver, f"w{number}"))
            await asyncio.sleep(0)
        scheduler.go.set()
        while len(scheduler.seen) < 101:
            outlet.came.clear()
            await outlet.came.wait()
    assert scheduler.plans == [1, 101]
    stamps = [o.fact.at_us for turn in outlet.turns for o in turn.observed]
    assert stamps == sorted(stamps)
    assert all(
        fact.at_us >= before.plan.now_us
        for before, after in zip(outlet.turns, outlet.turns[1:], strict=False)
        if before.plan is not None
        for fact in (o.fact for o in after.observed)
    ), "no fact is older than a plan that did not know it"
    assert await driver.ask(lambda s: threading.get_ident()) in scheduler.threads
    assert scheduler.threads.isdisjoint({threading.get_ident()}) and len(scheduler.threads) == 1
    driven.cancel()
    await asyncio.gather(driven, return_exceptions=True)
    driver.close()


async def test_a_full_inbox_drops_only_what_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "INBOX_MAX", 2)
    scheduler, outlet = SlowScheduler(), Turns()
    scheduler.go.set()
    driver = Driver(scheduler, SystemClock(), outlet)  # type: ignore[arg-type]

    def steps(*, last: bool) -> values.StepsEnded:
        return values.StepsEnded(
            at_us=driver.stamp(), sequence=1, jobs=(), step_time_us=(), last=last
        )

    for fact in (lost(driver, "w0"), lost(driver, "w1"), lost(driver, "w2")):
        driver.post(fact)
    driver.post(steps(last=False))
    driver.post(steps(last=True))
    driver.post(lost(driver, "w3"), unless=lambda _: False)
    assert driver.drops == {"StepsEnded": 1, "WorkerLost": 1}
    driven = asyncio.ensure_future(driver.run())
    async with asyncio.timeout(WAIT_S):
        await outlet.came.wait()
    assert [type(f).__name__ for f in scheduler.seen].count("WorkerLost") == 3
    assert any(isinstance(f, values.StepsEnded) and f.last for f in scheduler.seen)
    driven.cancel()


async def test_a_fact_that_is_no_news_when_its_turn_comes_is_not_shown() -> None:
    scheduler, outlet = SlowScheduler(), Turns()
    scheduler.go.set()
    driver = Driver(scheduler, SystemClock(), outlet)  # type: ignore[arg-type]
    driver.post(lost(driver, "w0"))
    driver.post(lost(driver, "w1"), unless=lambda s: bool(s.seen))  # type: ignore[attr-defined]
    driven = asyncio.ensure_future(driver.run())
    async with asyncio.timeout(WAIT_S):
        await outlet.came.wait()
    assert [f.worker for f in scheduler.seen if isinstance(f, values.WorkerLost)] == ["w0"]
    driven.cancel()


class LongPlans(SlowScheduler):
    """Its plans take 20 ms of a manual clock, and it wants the next one 1 ms later."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.clock = clock
        self.at_us: list[int] = []

    def plan(self, now_us: int) -> values.Plan:
        self.at_us.append(now_us)
        self.clock.advance_to(now_us + 20_000)
        return values.Plan(round=1, now_us=now_us, start_us=now_us)

    def wake_us(self) -> int | None:
        return self.at_us[-1] + 21_000 if self.at_us else 0


@pytest.mark.parametrize(
    ("newcomers", "pause_us"), [((0,), 1_000), ((16,), 1_000), ((48,), 80_000), ((16,) * 3, 80_000)]
)
async def test_plans_of_a_long_queue_give_way_to_a_flood_of_newcomers(
    newcomers: tuple[int, ...], pause_us: int
) -> None:
    clock = ManualClock()
    scheduler = LongPlans(clock)
    driver = Driver(scheduler, clock, Turns())  # type: ignore[arg-type]
    for count in newcomers:
        await driver.ask(lambda s: None, newcomers=count)
    driver.post(lost(driver, "w0"))
    driven = asyncio.ensure_future(driver.run())
    async with asyncio.timeout(WAIT_S):
        while len(scheduler.at_us) < 2:
            await asyncio.sleep(0)
            if not clock.settled() and (at_us := clock.next_wake_us()) is not None:
                clock.advance_to(at_us)
    assert scheduler.at_us[1] - scheduler.at_us[0] == 20_000 + pause_us
    driven.cancel()


async def test_a_bug_in_the_scheduler_ends_the_driver() -> None:
    class Broken(SlowScheduler):
        def observe(self, fact: values.Event) -> Sequence[values.Ended]:
            raise AssertionError("a bug")

    driver = Driver(Broken(), SystemClock(), Turns(), PlannerThread())  # type: ignore[arg-type]
    driver.post(lost(driver, "w0"))
    with pytest.raises(AssertionError, match="a bug"):
        async with asyncio.timeout(WAIT_S):
            await driver.run()
    driver.close()


async def test_more_workflows_than_are_kept_arrive_at_once() -> None:
    """As a new leader takes them up: each is taught with the request that names it."""
    count = WORKFLOWS_MAX + 20
    scheduler = Scheduler(Settings(policy="edf"), Profile({}))
    outlet = Turns()
    driver = Driver(scheduler, SystemClock(), outlet)
    for number in range(count):
        workflow = replace(CHAIN, name=f"own-{number}")
        request = values.Request(
            id=f"r{number}",
            model="m",
            shape=values.Shape(width=64, height=64),
            steps=4,
            deadline_us=None,
            workflow=workflow.name,
        )
        arrived = values.Arrived(at_us=driver.stamp(), request=request)
        driver.post(arrived, workflow=workflow)
    driven = asyncio.ensure_future(driver.run())
    async with asyncio.timeout(WAIT_S):
        await outlet.came.wait()
    driven.cancel()
    assert len(outlet.turns[0].observed) == count
    assert scheduler.job("r0") is not None and scheduler.job(f"r{count - 1}") is not None
