"""Batches under faults: who shares a batch with a job that fails or leaves loses nothing."""

import msgspec
import pytest

from control.scheduler.values import (
    DIT,
    TEXT,
    VAE,
    AssignmentFailed,
    CancelRequested,
    JobProgress,
    Layout,
    ModelFacts,
    Outcome,
    StepsEnded,
    WorkerLost,
    WorkerUp,
)

from .desk import BASE, Desk, brief
from .driving import FLUX, World

MISSING, ERROR, MEMORY = "LATENT_MISSING", "MODEL_ERROR", "OUT_OF_MEMORY"


def batch(names="abc", node=DIT, steps=4, **settings):
    """A desk of one worker on which those requests run in one assignment at that node."""
    settings = {"workers": 1, "mode": "throughput", "commit_steps": 0, **settings}
    desk = Desk("diflow", models=(BASE,), **settings)
    for name in names:
        desk.arrive(name, steps=steps, plan=False)
    desk.plan()
    while not any(a.node == node and len(a.batch) == len(names) for a in desk.flights):
        desk.next()
    (running,) = desk.flights
    return desk, running


def fail(desk, running, reason, holds=(), **more):
    """The worker gives the assignment, or one job of it, up; it holds those latents."""
    jobs = tuple(
        JobProgress(request=m.request, attempt=m.attempt, steps_done=m.first_step)
        for m in running.batch
        if m.request in holds
    )
    if not more.get("goes_on"):
        desk.flights.remove(running)
    fact = AssignmentFailed(
        at_us=desk.now_us,
        sequence=running.sequence,
        worker=running.workers[0],
        jobs=jobs,
        reason=reason,
        **more,
    )
    ended = desk.scheduler.observe(fact)
    desk.ended.update({e.request: e for e in ended})
    return [e.request for e in ended]


def told(desk, running, requests, steps, *, last=False, attempt=0, times=1):
    """A report of some of its jobs."""
    jobs = tuple(
        JobProgress(request=m.request, attempt=attempt, steps_done=m.first_step + steps)
        for m in running.batch
        if m.request in requests
    )
    fact = StepsEnded(
        at_us=desk.now_us,
        sequence=running.sequence,
        jobs=jobs,
        step_time_us=(running.step_time_us,) * times,
        last=last,
    )
    ended = desk.scheduler.observe(fact)
    desk.ended.update({e.request: e for e in ended})
    return [e.request for e in ended]


def cancel(desk, name):
    (ended,) = desk.scheduler.observe(CancelRequested(at_us=desk.now_us, request=name))
    assert ended.outcome is Outcome.CANCELLED


def view(desk, name):
    return desk.scheduler.job(name)


def sizes(assignments, node=DIT):
    return sorted(len(a.batch) for a in assignments if a.node == node)


# ------------------------------------------------------------------------------------ failures


def test_of_a_missing_latent_only_the_holders_that_were_asked_are_forgotten():
    desk, running = batch()
    fail(desk, running, MISSING, holds="bc", request="a", tried=("w0",))
    assert view(desk, "a").nodes[TEXT] == "ready" and not view(desk, "a").holders
    for mate in "bc":
        assert [h.worker for h in view(desk, mate).holders] == ["w0"]
        assert view(desk, mate).nodes[DIT] == "ready"


def test_who_was_not_asked_keeps_its_copy():
    desk, running = batch("a", workers=2)
    progress = JobProgress(request="a", attempt=0, steps_done=0)
    (here,) = running.workers
    (other,) = {"w0", "w1"} - {here}
    ledger = desk.scheduler._ledger
    ledger.tracked["a"].holders[other] = progress.steps_done
    fail(desk, running, MISSING, request="a", tried=(here,))
    assert [h.worker for h in view(desk, "a").holders] == [other]


def test_of_a_failed_batch_the_culprit_is_found_one_by_one():
    """The mates of a job that always fails run alone, and end well."""
    desk, running = batch(steps=2)
    fail(desk, running, ERROR, holds="abc")
    queue = desk.plan()
    while desk.flights or queue:
        for a in list(desk.flights):
            assert len(a.batch) == 1 or a.node != DIT
            if a.node == DIT and a.batch[0].request == "b":
                fail(desk, a, ERROR, holds="b")
        queue = desk.next() if desk.flights else desk.plan()
    outcomes = {name: end.outcome for name, end in desk.ended.items()}
    assert outcomes == {"a": Outcome.DONE, "b": Outcome.FAILED, "c": Outcome.DONE}
    assert desk.ended["b"].reason == ERROR


def test_a_named_failure_is_a_strike_for_that_job_alone():
    desk, running = batch()
    for attempt in range(3):
        assert fail(desk, running, ERROR, holds="abc", request="b") == ["b"] * (attempt == 2)
        if attempt < 2:
            (running,) = desk.plan()
            assert len(running.batch) == 3, "the mates are not held apart from it"


def test_one_job_given_up_leaves_the_others_at_their_steps():
    desk, running = batch()
    fail(desk, running, ERROR, holds="b", request="b", goes_on=True)
    for mate in "ac":
        assert view(desk, mate).outstanding == (running.sequence,)
        assert view(desk, mate).attempt == 0
    assert view(desk, "b").attempt == 1 and not view(desk, "b").outstanding
    told(desk, running, "ac", 4, last=True, times=4)
    assert view(desk, "a").steps_done == view(desk, "c").steps_done == 4


def test_a_batch_too_large_for_the_memory_is_halved():
    desk, running = batch("abcd")
    for size, expected in ((4, [2]), (2, [1])):
        assert len(running.batch) == size
        assert fail(desk, running, MEMORY, holds="abcd") == []
        starts = desk.plan()
        assert sizes(starts) == expected
        running = starts[0]
    desk.arrive("e")
    desk.run()
    assert all(len(a.batch) == 1 for a in desk.log if a.node == DIT and a.sequence > 5)
    assert {e.outcome for e in desk.ended.values()} == {Outcome.DONE}


def test_who_says_how_many_were_together_is_believed():
    desk, running = batch("abcd")
    fail(desk, running, MEMORY, holds="abcd", batch=3)
    assert sizes(desk.plan()) == [1], "3 did not fit; of half as many, one"


@pytest.mark.parametrize("policy", ["hocket", "edf", "tetriserve"])
def test_one_job_too_large_for_a_worker_gets_a_wider_group(policy):
    world = World(workers=2, policy=policy)
    plan = world.encoded("a", px=256)
    for _ in range(2):  # at the latest on both, if it began wide
        (running,) = plan.assignments
        if len(running.workers) == 2:
            break
        world.fail(running, running.workers[0], MEMORY, holds=0)
        plan = world.plan()
    assert len(running.workers) == 2
    for _ in range(3):
        if not world.ended:
            world.fail(running, running.workers[0], MEMORY, holds=0)
            running = (world.plan().assignments or (running,))[0]
    (ended,) = world.ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, MEMORY)


def test_one_job_too_large_for_a_kind_of_workers_goes_to_another():
    """No strike for what a place cannot hold: only where nothing else is left."""
    world = World(workers=0, policy="hocket", failures_max=1)
    facts = ModelFacts(name=FLUX.name, degrees=(1, 2))
    for i, gpu in enumerate(("h100", "h100", "h200")):
        fact = WorkerUp(at_us=0, worker=f"w{i}", incarnation="1", gpu=gpu, models=(facts,))
        world.observe(fact)
    (running,) = world.encoded("a", px=2048).assignments
    places = []
    while not world.ended:
        places.append(running.workers)
        world.fail(running, running.workers[0], MEMORY)
        plan = world.plan()
        if plan.assignments and plan.assignments[0].node == TEXT:
            world.over(plan.assignments[0])
            plan = world.plan()
        running = (plan.assignments or (None,))[0]
    assert ("w2",) in places and ("w0", "w1") in places
    assert 2 <= len(places) <= 3 and world.ended[0].reason == MEMORY


# ------------------------------------------------------------------------------------ leaving


def test_a_cancelled_job_leaves_and_the_others_go_on():
    desk, running = batch()
    told(desk, running, "abc", 1)
    cancel(desk, "b")
    plan = desk.scheduler.plan(desk.now_us)
    assert [(t.request, t.release) for t in plan.truncations] == [("b", True)]
    assert not plan.assignments
    told(desk, running, "ac", 2)
    told(desk, running, "ac", 4, last=True, times=2)
    for mate in "ac":
        assert (view(desk, mate).steps_done, view(desk, mate).attempt) == (4, 0)
    assert desk.scheduler.outstanding() == ()


def test_the_last_one_to_leave_takes_the_assignment_along():
    desk, running = batch("ab")
    cancel(desk, "a")
    assert desk.scheduler.outstanding() != ()
    cancel(desk, "b")
    assert desk.scheduler.outstanding() == ()
    assert not desk.scheduler._ledger.board.retired and running


def test_a_late_report_still_helps_after_a_mate_has_ended():
    desk, running = batch("ab")
    told(desk, running, "ab", 1)
    fail(desk, running, "PEER_LOST", holds="", suspects=())
    cancel(desk, "a")
    assert view(desk, "b").steps_done == 1
    told(desk, running, "ab", 2)
    assert view(desk, "b").steps_done == 2, "the step in hand ended after all"


def test_who_left_is_told_of_once_more():
    """Its holder died, so that it was called off; the worker made a step of it all the same."""
    desk, running = batch("ab", workers=2)
    (here,) = running.workers
    ledger = desk.scheduler._ledger
    ledger.call_off(ledger.tracked["b"], desk.now_us)
    ledger.tracked["b"].attempt += 1
    ledger.fall_back(ledger.tracked["b"])
    assert view(desk, "b").steps_done == 0
    told(desk, running, "ab", 1)
    assert view(desk, "b").steps_done == 1
    assert [h.worker for h in view(desk, "b").holders] == [here]
    assert view(desk, "a").outstanding == (running.sequence,)


def test_a_lost_worker_costs_all_of_its_batch_a_new_attempt():
    desk, running = batch(workers=2)
    desk.scheduler.observe(WorkerLost(at_us=desk.now_us, worker=running.workers[0]))
    assert {view(desk, name).attempt for name in "abc"} == {1}
    assert desk.scheduler.outstanding() == ()


# ------------------------------------------------------------------------------------ decodes


def test_each_decoded_job_ends_with_its_own_report():
    desk, running = batch("abc", node=VAE)
    assert told(desk, running, "a", 0) == ["a"]
    assert view(desk, "b").outstanding == (running.sequence,)
    assert told(desk, running, "b", 0) == ["b"]
    assert told(desk, running, "c", 0, last=True) == ["c"]
    assert desk.scheduler.outstanding() == ()


def test_a_file_that_was_not_stored_repeats_its_own_decode_only():
    desk, running = batch("abc", node=VAE)
    told(desk, running, "a", 0)
    assert fail(desk, running, "MEDIA_NOT_STORED", holds="b", request="b", goes_on=True) == []
    assert told(desk, running, "c", 0, last=True) == ["c"]
    desk.flights.clear()
    (again,) = desk.plan()
    assert brief([again])[0][:2] == (VAE, ("b",))


def test_a_mate_cancelled_in_a_decode_costs_nobody_else_anything():
    desk, running = batch("abc", node=VAE)
    told(desk, running, "a", 0)
    cancel(desk, "b")
    assert told(desk, running, "c", 0, last=True) == ["c"]
    assert not desk.scheduler.outstanding()


def test_a_job_whose_report_got_lost_is_decoded_again():
    desk, running = batch("ab", node=VAE)
    told(desk, running, "b", 0, last=True)
    desk.flights.clear()
    (again,) = desk.plan()
    assert brief([again])[0][:2] == (VAE, ("a",)) and again.batch[0].attempt == 1


# ------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("told_halves", "layout"),
    [((True, True), Layout(cfg=2)), ((True, False), Layout(ulysses=2))],
)
def test_halves_of_guidance_only_where_all_members_obey_layouts(told_halves, layout):
    world = World(workers=0, policy="fixed-2")
    for i, halves in enumerate(told_halves):
        facts = ModelFacts(name=FLUX.name, degrees=(1, 2), halves=halves)
        fact = WorkerUp(at_us=0, worker=f"w{i}", incarnation="1", gpu="h100", models=(facts,))
        world.observe(fact)
    world.arrive("a")
    (tracked,) = world.scheduler._ledger.tracked.values()
    tracked.request = msgspec.structs.replace(tracked.request, branches=2)
    (encode,) = world.plan().assignments
    world.over(encode)
    (step,) = world.plan().assignments
    assert step.layout == layout
