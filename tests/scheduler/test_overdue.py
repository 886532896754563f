"""Assignments that nobody hears of any more: found by their predicted span, redone elsewhere."""

import pytest

from control.scheduler.books.overdue import LATE_US
from control.scheduler.values import (
    CancelRequested,
    JobProgress,
    NothingHeard,
    Outcome,
    StepsEnded,
    WorkerUp,
)

from .bad_workers import Cluster
from .driving import FLUX, World, only

POLICIES = ["hocket", "edf", "tetriserve", "sjf"]


def beat(worker, at_us, pending=()):
    return WorkerUp(
        at_us=at_us,
        worker=worker,
        incarnation="1",
        gpu="h100",
        host="host000",
        models=(FLUX,),
        pending=tuple(pending),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_device_that_hangs_is_found_and_its_job_redone(policy):
    """The lease lives, heartbeats name the assignment, no report comes."""
    cluster = Cluster(
        policy,
        hangs=lambda worker, request, now_us: worker == "w0000" and now_us < 2_000_000,
        requests=20,
    )
    loop = cluster.loop
    while loop.instant():
        if loop.now_us > 30_000_000:
            break
    (hung,) = cluster.workers.hung
    assert not cluster.failed and len(loop.result.ended) == 20
    found = [p.now_us for p in loop.result.plans if any(t.workers for t in p.truncations)]
    assert found and found[0] < 12_000_000
    (view,) = [w for w in loop.scheduler.workers() if w.name == "w0000"]
    assert view.state == "suspect" and not view.usable
    assert loop.scheduler.awaits("w0000")
    sequence = hung.assignment.sequence
    loop.scheduler.observe(beat("w0000", loop.now_us + 1, [sequence]))
    (view,) = [w for w in loop.scheduler.workers() if w.name == "w0000"]
    assert not view.usable, "it lives, but it still has the assignment in hand"
    loop.scheduler.observe(beat("w0000", loop.now_us + 2))
    (view,) = [w for w in loop.scheduler.workers() if w.name == "w0000"]
    assert view.usable and not loop.scheduler.awaits("w0000")


@pytest.fixture
def one():
    """One of two workers runs a job."""
    world = World(workers=2, policy="sjf")
    world.arrive("a")
    encode = only(world.plan())
    world.over(encode)
    return world, only(world.plan())


def sleep(world, us):
    world.now_us += us


def test_each_report_puts_the_end_off(one):
    world, a = one
    first_us = world.scheduler.wake_us()
    assert first_us >= world.now_us + world.settings.hung_min_us
    sleep(world, a.step_time_us)
    world.step(a, 1)
    assert world.scheduler.wake_us() > first_us - a.step_time_us * 8
    sleep(world, 4_000_000)
    world.step(a, 2)
    left_us = (a.steps - 2) * a.step_time_us_safe * 8
    assert world.scheduler.wake_us() == world.now_us + max(left_us, 5_000_000)


def overdue(world):
    """On to the plan that gives something up."""
    for _ in range(100):
        world.now_us = max(world.now_us, world.scheduler.wake_us())
        plan = world.plan()
        world.ended += plan.ended
        if plan.truncations or plan.released:
            return plan
    raise AssertionError("nothing is overdue")


def test_an_overdue_job_goes_to_another_worker_and_its_old_one_waits(one):
    world, a = one
    plan = overdue(world)
    again = only(plan)
    assert again.batch[0].attempt == 1 and again.workers != a.workers
    assert [t.request for t in plan.truncations] == ["a"]
    assert not world.ended


def test_a_late_report_shows_that_it_was_slow_and_such_calls_get_longer(one):
    world, a = one
    span_us = world.scheduler.wake_us() - world.now_us
    overdue(world)
    world.observe(late(world, a, 3))
    (view,) = [w for w in world.scheduler.workers() if w.name == a.workers[0]]
    assert view.usable
    (encode,) = world.scheduler.outstanding()
    world.over(encode)
    (again,) = world.plan().assignments
    assert (again.node, again.steps) == ("dit", a.steps)
    assert world.scheduler.wake_us() == world.now_us + 2 * span_us


def late(world, a, done):
    m = a.batch[0]
    progress = JobProgress(request=m.request, attempt=m.attempt, steps_done=m.first_step + done)
    return StepsEnded(
        at_us=world.now_us,
        sequence=a.sequence,
        jobs=(progress,),
        step_time_us=(1_000_000,) * done,
        last=False,
    )


def test_time_in_which_nobody_was_heard_of_counts_for_nobody(one):
    world, _ = one
    due_us = world.scheduler.wake_us()
    world.observe(NothingHeard(at_us=due_us - 1))
    assert world.scheduler.wake_us() > due_us + 4_000_000


def test_a_control_that_was_held_up_gives_everybody_time_again(one):
    world, a = one
    world.now_us = world.scheduler.wake_us() + LATE_US + 1
    assert not world.plan().assignments
    assert world.view("a").outstanding == (a.sequence,)
    world.now_us = world.scheduler.wake_us()
    assert only(world.plan()).batch[0].attempt == 1


def test_a_group_has_twice_as_long_and_then_all_of_it_is_suspect():
    world = World(workers=4)
    group = only(world.encoded("a", px=2048, slo_us=60_000_000))
    begun_us = world.now_us
    span_us = max(5_000_000, 8 * group.steps * group.step_time_us_safe)
    overdue(world)
    assert world.now_us == begun_us + 2 * span_us
    states = {w.name: w.state for w in world.scheduler.workers()}
    assert {states[w] for w in group.workers} == {"suspect"}


def test_what_waits_behind_another_run_is_not_overdue_before_it():
    world = World(workers=1)
    for name in "abcdef":
        world.arrive(name)
    first, *behind = world.plan().assignments
    assert behind and all(a.workers == first.workers for a in behind), "all encodes, in a row"
    overdue(world)
    assert not world.view(first.batch[0].request).attempt - 1
    assert world.now_us < behind[0].start_us + 2 * world.settings.hung_min_us


@pytest.mark.parametrize("called_off", [False, True])
def test_what_is_ahead_ending_early_brings_the_end_forward_however_often_one_asks(called_off):
    ends = []
    for curious in (False, True):
        world = World(workers=1, hung_min_us=1)
        for name in "abcdef":
            world.arrive(name)
        first, *behind = world.plan().assignments
        assert behind
        if curious:
            world.scheduler.wake_us()
        sleep(world, 1_000)
        if called_off:
            world.observe(CancelRequested(at_us=world.now_us, request=first.batch[0].request))
        else:
            world.step(first, 1, last=True)
        ledger = world.scheduler._ledger
        ends.append(ledger.overdue.next_us(ledger.board, ledger.cluster))
    assert ends[0] == ends[1]


def test_reports_bring_the_end_forward_however_often_one_asks():
    """A run that hangs at its last steps is found by these, not by the whole of it."""
    ends = []
    for curious in (False, True):
        world = World(workers=2, policy="sjf", hung_min_us=1)
        world.arrive("a")
        world.over(only(world.plan()))
        a = only(world.plan())
        for done in range(1, a.steps):
            if curious:
                world.scheduler.wake_us()
            sleep(world, a.step_time_us)
            world.step(a, done)
        ends.append(world.scheduler.wake_us())
    assert ends[0] == ends[1] == world.now_us + int(8 * a.step_time_us_safe)


def test_the_heap_of_ends_is_bounded():
    world = World(workers=1, policy="sjf")
    world.arrive("a", steps=5_000)
    world.over(only(world.plan()))
    done = 0
    ends = world.scheduler._ledger.overdue
    while done < 2_000:
        for a in world.plan().assignments or world.scheduler.outstanding():
            sleep(world, a.step_time_us)
            world.step(a, 1, last=a.steps == 1)
            done += 1
        world.scheduler.wake_us()
        assert len(ends._ends) < 300 and len(ends._parts) < 300


def test_a_job_that_hangs_everywhere_ends():
    world = World(workers=1)
    world.arrive("a")
    world.plan()
    tries = 0
    while not world.ended:
        overdue(world)
        tries += 1
        world.up("w0")
        world.plan()
    (ended,) = world.ended
    assert (ended.outcome, ended.reason, tries) == (Outcome.FAILED, "HUNG", 12)


def test_nothing_is_overdue_where_that_is_switched_off():
    world = World(workers=1, policy="sjf", hung_after_factor=0)
    world.arrive("a")
    world.plan()
    assert world.scheduler.wake_us() is None
