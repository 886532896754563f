"""Among equals the first come is served first: 24 pictures of one size and deadline."""

import msgspec
import pytest

from bench.sim.loop import run
from control.scheduler.policies.hocket.binding import Wish
from control.scheduler.policies.hocket.filling import first_come
from control.scheduler.values import DIT

from .driving import World, case


def completion(count, gap_us, slo_us, workers, **options):
    """Ranks of arrival in the order of their ends, those on time first; and whether they were."""
    rows = [(i * gap_us, 1024, slo_us) for i in range(count)]
    one = case(rows, steps=12, workers=workers, policy="hocket", **options)
    trace = tuple(msgspec.structs.replace(r, id=f"r{i:02d}") for i, r in enumerate(one.trace))
    result = run(msgspec.structs.replace(one, trace=trace))
    ends = sorted(result.ended, key=lambda e: (not e.on_time, e.at_us, e.request))
    return [(int(e.request[1:]), e.on_time) for e in ends]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("gap_us", [0, 1_000, 30_000])
@pytest.mark.parametrize("slo_us", [60_000_000, 6_000_000, 2_000_000, 1])
def test_equals_end_in_the_order_in_which_they_came(workers, gap_us, slo_us):
    """But for those that run side by side. The last ones may still be on time when others cannot,
    so that those that are and those that are not are two orders.
    """
    found = completion(24, gap_us, slo_us, workers)
    assert len(found) == 24
    for on_time in (True, False):
        order = [i for i, met in found if met is on_time]
        places = {i: place for place, i in enumerate(sorted(order))}
        moved = [abs(place - places[i]) for place, i in enumerate(order)]
        assert max(moved, default=0) < workers, found


def test_of_two_equals_that_wait_the_first_come_takes_the_start():
    """However the decision came to choose the younger one."""
    world = World(workers=2, policy="hocket")
    for name in ("old", "young"):
        world.arrive(name, slo_us=10_000_000)
    for encode in world.plan().assignments:
        world.over(encode)
    ledger, planner = world.scheduler._ledger, world.scheduler._planner
    planner._pods.follow(ledger, ledger.touched)
    pod = planner._pods.pods[0]
    roster = planner._maker.make(ledger, pod, world.now_us, look=True)
    wish = Wish([ledger.tracked["young"]], DIT, 1, 1, "on-time", 55_000.0)
    first_come(ledger, roster, [wish], world.now_us)
    assert wish.first.id == "old"
    ledger.tracked["young"].steps_done = 5
    wish.members = [ledger.tracked["young"]]
    first_come(ledger, roster, [wish], world.now_us)
    assert wish.first.id == "young", "it is nearer to its end"
