"""The scheduler driven by hand: arrivals, rounds, amendments, cancellation, drain."""

import pytest

from control.scheduler.values import (
    CancelRequested,
    DrainRequested,
    Outcome,
)

from .driving import World, only


def test_an_arrival_into_an_idle_cluster_does_not_wait():
    world = World()
    world.now_us = 123_456
    assert world.scheduler.wake_us() is None
    world.arrive("a", px=1024, slo_us=3_000_000)
    assert world.scheduler.due(world.now_us)
    encode = only(world.plan())
    assert (encode.node, encode.steps, encode.start_us) == ("text", 1, 123_456)
    assert encode.batch[0].holders == ()
    hung_us = world.now_us + world.settings.hung_min_us
    assert not world.scheduler.due(world.now_us) and world.scheduler.wake_us() == hung_us
    world.over(encode)
    assert world.scheduler.due(world.now_us)
    plan = world.plan()
    first = only(plan)
    assert plan.start_us == world.now_us == first.start_us, "the grid re-anchors at once"
    assert first.node == "dit" and first.batch[0].first_step == 0
    assert [(h.worker, h.steps_done) for h in first.batch[0].holders] == [(encode.workers[0], 0)]
    assert world.scheduler.wake_us() == plan.start_us + 5 * 60_000


def finish(world, name):
    """Carries out all plans as predicted until a request ends; returns its assignments."""
    seen = []
    while world.scheduler.job(name) is not None:
        open_ = world.scheduler.outstanding()
        wake_us = world.scheduler.wake_us()
        ends = [a.end_us for a in open_]
        assert ends or wake_us is not None, "stuck"
        if wake_us is not None and (not ends or wake_us < min(ends)):
            world.now_us = max(world.now_us, wake_us)
        else:
            first = min(open_, key=lambda a: (a.end_us, a.sequence))
            world.over(first)
        if world.scheduler.due(world.now_us) or world.now_us == world.scheduler.wake_us():
            seen += world.plan().assignments
    return seen


@pytest.mark.parametrize("lead_us", [0, 30_000])
@pytest.mark.parametrize("policy", ["tetriserve", "fixed-1", "hocket"])
def test_a_request_runs_to_its_end(policy, lead_us):
    world = World(policy=policy, lead_us=lead_us)
    world.arrive("a", px=512, slo_us=3_000_000)
    seen = [*world.plan().assignments, *finish(world, "a")]
    assert (seen[0].node, seen[-1].node) == ("text", "vae")
    steps = [
        s for a in seen if a.node == "dit" for s in range(a.batch[0].first_step, 99)[: a.steps]
    ]
    assert steps == list(range(28))
    assert seen[-1].workers[0] in seen[-2].workers, "decode prefers a holder"
    (ended,) = world.ended
    assert ended.outcome is Outcome.DONE and ended.on_time and ended.steps_done == 28
    assert ended.steps_lost == ended.moves == ended.degree_changes == 0
    assert world.plans[-1].released == ("a",)
    assert world.scheduler.wake_us() is None and not world.scheduler.outstanding()


def test_with_a_lead_the_next_assignment_is_out_before_the_boundary():
    world = World(lead_us=30_000)
    first = only(world.encoded("a", px=512, slo_us=5_000_000))
    boundary_us = world.plans[-1].start_us + 5 * 55_500
    assert world.scheduler.wake_us() == boundary_us - 30_000
    world.now_us = boundary_us - 30_000
    plan = world.plan()
    second = only(plan)
    assert plan.start_us == boundary_us
    assert second.batch[0].first_step == first.batch[0].first_step + first.steps
    assert second.start_us == first.end_us, "no gap between assignments"
    assert [h.worker for h in second.batch[0].holders] == list(first.workers)
    assert second.workers == first.workers and second.epoch == first.epoch
    again = world.scheduler.plan(world.now_us + 1)
    assert not again.assignments, "one outstanding, one next"


def test_rounds_are_half_open():
    """A fact stamped at the boundary belongs to the round that begins there."""

    def round_of(offset_us):
        world = World(amend=True, round_us=500_000)
        only(world.encoded("a", px=2048, slo_us=10_000_000))
        start = world.plans[-1]
        world.now_us = start.start_us + 500_000 + offset_us
        world.arrive("b", px=256, slo_us=1_500_000)
        return world.plan(), start

    before, start = round_of(-1)
    assert before.round == start.round and before.start_us == before.now_us
    at, start = round_of(0)
    assert at.round == start.round + 1 and at.start_us == start.start_us + 500_000


def test_amendments_give_idle_workers_to_waiting_jobs_and_only_those():
    world = World()
    running = only(world.encoded("big", px=2048, steps=28, slo_us=60_000_000))
    assert running.workers == tuple(f"w{i}" for i in range(8))
    world = World(policy_settings={"scale_up": False})
    running = only(world.encoded("big", px=1024, slo_us=60_000_000))
    world.now_us += 1_000
    first = only(world.encoded("small", px=256, slo_us=60_000_000))
    amendment = world.plans[-1]
    assert amendment.round == world.plans[1].round and amendment.start_us == world.now_us
    assert set(first.workers).isdisjoint(running.workers)
    boundary_us = world.scheduler.wake_us()
    assert first.end_us <= boundary_us + 22_300


def test_as_published_arrivals_wait_for_the_boundary():
    world = World(amend=False, policy_settings={"scale_up": False})
    only(world.encoded("big", px=1024, slo_us=60_000_000))
    world.now_us += 1_000
    world.arrive("small", px=256, slo_us=60_000_000)
    world.over(only(world.plan()))
    assert not world.scheduler.due(world.now_us)
    assert not world.plan().assignments
    world.now_us = world.scheduler.wake_us()
    assert "small" in {a.batch[0].request for a in world.plan().assignments}


def test_without_rounds_every_event_is_a_planning_point():
    world = World(rounds=False, policy_settings={"scale_up": False})
    only(world.encoded("a", px=1024, slo_us=60_000_000))
    world.now_us += 1_000
    second = only(world.encoded("b", px=256, slo_us=60_000_000))
    assert second.start_us == world.now_us
    assert world.plans[-1].round > world.plans[1].round


def test_cancel_ends_at_once_and_truncates():
    world = World()
    running = only(world.encoded("a", slo_us=5_000_000))
    world.observe(CancelRequested(at_us=world.now_us, request="a"))
    (ended,) = world.ended
    assert ended.outcome is Outcome.CANCELLED and not ended.on_time
    assert world.scheduler.job("a") is None
    plan = world.plan()
    (truncation,) = plan.truncations
    assert truncation.request == "a" and truncation.release and truncation.attempt == 0
    assert set(running.workers) <= set(truncation.workers)
    assert not plan.released
    world.step(running, 1, last=True)  # the report of the step that was under way
    world.observe(CancelRequested(at_us=world.now_us, request="a"))
    assert len(world.ended) == 1 and not world.plan().truncations


def test_cancel_of_a_parked_request_releases():
    world = World(workers=1)
    world.arrive("a")
    world.over(only(world.plan()))
    world.observe(CancelRequested(at_us=world.now_us, request="a"))
    plan = world.plan()
    assert plan.released == ("a",) and not plan.truncations


def test_a_drained_worker_gets_nothing_new_and_its_job_moves():
    world = World(workers=2, policy_settings={"scale_up": False})
    first = only(world.encoded("a", slo_us=60_000_000))
    (there,) = first.workers
    world.observe(DrainRequested(at_us=world.now_us, worker=there))
    world.over(first)
    second = only(world.plan())
    assert set(second.workers).isdisjoint(first.workers)
    assert second.batch[0].holders[0].worker == there, "it still hands the latent out"
    world.over(second)
    assert world.view("a").moves == 1
    world.observe(DrainRequested(at_us=world.now_us, worker=there, draining=False))
    assert [w.usable for w in world.scheduler.workers()] == [True, True]


def test_without_workers_requests_wait():
    world = World(workers=0)
    world.arrive("a", slo_us=1_000)
    assert not world.plan().assignments and world.scheduler.wake_us() is None
    world.up("late")
    assert world.scheduler.due(world.now_us)
    assert only(world.plan()).workers == ("late",)


def test_predictions_grow_with_load():
    world = World()
    world.arrive("a", px=1024, slo_us=3_000_000)
    alone_us = world.scheduler.eta_us("a", 0)
    assert alone_us == 30_000 + 28 * 60_000 + 120_000
    for i in range(20):
        world.arrive(f"r{i}", px=2048, slo_us=2_000_000)
    assert world.scheduler.eta_us("a", 0) > alone_us
    assert world.scheduler.eta_us("nobody", 0) is None
