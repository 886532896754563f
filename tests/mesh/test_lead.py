"""What `hocket` does with a lead, as live: it plans on runs that are not over yet."""

from __future__ import annotations

import pytest

from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    DIT,
    TEXT,
    Arrived,
    Assignment,
    DrainRequested,
    JobProgress,
    ModelFacts,
    Request,
    Shape,
    StepsEnded,
    WorkerUp,
)

STEP_US, LEAD_US = 100_000, 20_000
MODEL = ModelFacts(name="m")
DEADLINE_US = 60_000_000


def made(*workers: str) -> Scheduler:
    settings = Settings(policy="hocket", lead_us=LEAD_US, default_step_us=STEP_US)
    scheduler = Scheduler(settings, Profile({}))
    for name in workers:
        up = WorkerUp(at_us=0, worker=name, incarnation="1", gpu="any", models=(MODEL,))
        scheduler.observe(up)
    return scheduler


def arrive(scheduler: Scheduler, name: str, at_us: int) -> None:
    shape = Shape(width=64, height=64)
    request = Request(id=name, model="m", shape=shape, steps=10, deadline_us=DEADLINE_US)
    scheduler.observe(Arrived(at_us=at_us, request=request))


def over(scheduler: Scheduler, assignment: Assignment, at_us: int) -> None:
    member = assignment.batch[0]
    done = member.first_step + assignment.steps if assignment.node == DIT else 0
    progress = JobProgress(request=member.request, attempt=member.attempt, steps_done=done)
    times = (at_us - assignment.start_us,)
    scheduler.observe(
        StepsEnded(
            at_us=at_us,
            sequence=assignment.sequence,
            jobs=(progress,),
            step_time_us=times,
            last=True,
        )
    )


def planned(scheduler: Scheduler, at_us: int) -> tuple[Assignment, ...]:
    return scheduler.plan(at_us).assignments


def denoising(scheduler: Scheduler) -> Assignment:
    """The first step of a request that is alone."""
    arrive(scheduler, "a", 0)
    (text,) = planned(scheduler, 0)
    assert text.node == TEXT
    over(scheduler, text, text.end_us)
    (step,) = planned(scheduler, text.end_us)
    return step


def test_who_is_late_gets_nothing_before_its_report() -> None:
    scheduler = made("w0", "w1")
    step = denoising(scheduler)
    late_us = step.end_us + 3 * STEP_US
    for name in ("b", "c"):
        arrive(scheduler, name, late_us)
    (text,) = planned(scheduler, late_us)
    assert step.workers != text.workers, "the other worker, and one request waits"
    over(scheduler, step, late_us + 1)
    assert step.workers in [a.workers for a in planned(scheduler, late_us + 1)]


def test_a_worker_is_given_one_run_ahead() -> None:
    scheduler = made("w0")
    step = denoising(scheduler)
    soon_us = step.end_us - LEAD_US
    (ahead,) = planned(scheduler, soon_us)
    assert ahead.start_us == step.end_us and ahead.batch[0].first_step == 1
    arrive(scheduler, "b", soon_us + 1)
    assert planned(scheduler, soon_us + 1) == ()


def test_the_next_step_follows_the_run_under_way_not_the_last_report() -> None:
    scheduler = made("w0", "w1")
    first = denoising(scheduler)
    (here,) = first.workers
    scheduler.observe(DrainRequested(at_us=first.start_us + 1, worker=here))
    (second,) = planned(scheduler, first.end_us - LEAD_US)
    assert second.workers != first.workers and second.start_us == first.end_us
    over(scheduler, first, first.end_us)
    scheduler.observe(DrainRequested(at_us=first.end_us + 1, worker=here, draining=False))
    (third,) = planned(scheduler, second.end_us - LEAD_US)
    assert third.batch[0].first_step == 2 and third.workers == second.workers


@pytest.mark.parametrize("real_us", [85_000, 100_000, 115_000])
def test_each_step_leaves_before_the_one_ahead_of_it_ends(real_us: int) -> None:
    """Also where steps take other times than predicted: errors do not add up."""
    scheduler = made("w0")
    queue = [denoising(scheduler)]
    end_us = queue[0].start_us + real_us
    ahead = 0
    while queue[0].node == DIT:
        wake_us = scheduler.wake_us()
        now_us = end_us if wake_us is None else min(wake_us, end_us)
        if now_us == end_us:
            over(scheduler, queue.pop(0), now_us)
            end_us += real_us
        issued = planned(scheduler, now_us)
        ahead += len(issued) if queue else 0
        queue += issued
    assert ahead == 10  # the decode, too
