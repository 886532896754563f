"""A plan does what its budget allows and leaves the rest to the next, at once."""

import pytest

from control.scheduler.values import DIT

from .driving import World


def burst(lead_us, budget=20_000):
    """64 workers in eight pods, and a newcomer for each of them at one instant."""
    settings = {"plan_operations_max": budget}
    world = World(workers=64, policy="hocket", lead_us=lead_us, policy_settings=settings)
    for i in range(64):
        world.arrive(f"r{i:02d}", slo_us=60_000_000)
    return world


@pytest.mark.parametrize("lead_us", [0, 20_000])
def test_a_burst_is_planned_in_several_plans_at_one_instant(lead_us):
    world, plans = burst(lead_us), 0
    while world.scheduler.due(world.now_us):
        plan = world.plan()
        plans += 1
        assert plan.assignments, "each gets on"
        assert world.scheduler.operations < 20_000 + 200_000
        if world.scheduler.due(world.now_us):
            assert world.scheduler.wake_us() == world.now_us, "drivers come back at once"
    assert plans > 1
    assert len({w for a in world.scheduler.outstanding() for w in a.workers}) == 64


@pytest.mark.parametrize("budget", [20_000, 3_000_000])
def test_with_a_lead_only_pods_with_news_or_an_end_are_looked_at(budget, monkeypatch):
    world = burst(20_000, budget)
    while world.scheduler.due(world.now_us):
        world.plan()
    world.now_us = world.scheduler.wake_us()  # all encodes end soon
    while world.scheduler.due(world.now_us) or world.scheduler.wake_us() == world.now_us:
        world.plan()
    planner = world.scheduler._planner
    looked: list[int] = []
    make = planner._maker.make

    def counted(ledger, pod, *more, **options):
        looked.append(pod.index)
        return make(ledger, pod, *more, **options)

    monkeypatch.setattr(planner._maker, "make", counted)
    first = world.scheduler.outstanding()[0]
    world.over(first)
    while world.scheduler.due(world.now_us):
        world.plan()
    assert set(looked) == {planner._pods.home[w].index for w in first.workers}


def test_the_next_wake_is_the_first_end_less_the_lead():
    """As a walk over all that is under way says; nothing else is due in between."""
    world = burst(20_000, 3_000_000)
    world.plan()
    for _ in range(300):
        flights = world.scheduler.outstanding()
        if not flights:
            break
        ends = [a.end_us - 20_000 for a in flights]
        later = [us for us in ends if us > world.scheduler._planned_us]
        assert world.scheduler.wake_us() == min(later, default=None)
        world.over(min(flights, key=lambda a: (a.end_us, a.sequence)))
        if world.scheduler.due(world.now_us):
            world.plan()
    assert any(a.node == DIT for p in world.plans for a in p.assignments)
