"""A firm promise holds: who was told "on time" is not given up for one that came later."""

import msgspec
import pytest

from bench.sim.case import PromiseSpec
from bench.sim.loop import run
from control.scheduler.books.commitments import FIRM_BROKEN, MARGIN_GAIN, Commitments
from control.scheduler.values import Arrived, Ended, Outcome, Request, Shape

from .driving import World, case


def request(name, px=512, slo_us=None, at_us=0, steps=10, firm=False, **more):
    deadline_us = None if slo_us is None else at_us + slo_us
    shape = Shape(width=px, height=px)
    return Request(
        id=name,
        model="flux.1-dev",
        shape=shape,
        steps=steps,
        deadline_us=deadline_us,
        firm=firm,
        **more,
    )


def admitted(world, asked, on_time=None):
    """Asks, tells and enters; whether it was told "on time"."""
    (told,) = world.scheduler.forecast((asked,), world.now_us)
    finish_us = told.finish_us_p95 if asked.firm else told.finish_us
    yes = finish_us <= asked.deadline_us if on_time is None else on_time
    world.observe(
        Arrived(at_us=world.now_us, request=asked, promised_us=told.finish_us, on_time=yes)
    )
    return yes


def drained(world):
    for _ in range(1000):
        world.plan()
        flights = world.scheduler.outstanding()
        if not flights:
            break
        world.over(min(flights, key=lambda a: (a.end_us, a.sequence)))
    return {e.request: e.on_time for e in world.ended}


@pytest.mark.parametrize("firm", [True, False])
def test_a_newcomer_may_not_push_out_a_firm_one(firm):
    """One worker, time for one of them: the second is due first."""
    world = World(workers=1, policy="hocket")
    assert admitted(world, request("old", slo_us=1_200_000, firm=firm))
    world.plan()
    told = admitted(world, request("new", slo_us=1_000_000, at_us=world.now_us))
    assert told is not firm
    assert drained(world)["old"] is firm


def test_the_promised_are_kept_before_many_that_nothing_was_promised():
    world = World(workers=1, policy="hocket")
    assert admitted(world, request("firm", slo_us=1_200_000, firm=True))
    for i in range(6):
        admitted(world, request(f"r{i}", px=256, slo_us=600_000, priority=5), on_time=True)
    ended = drained(world)
    assert ended["firm"] and len(ended) == 7


@pytest.mark.parametrize("priority", [-1_000, -11, 0, 10_000, 1_000_000])
def test_no_priority_makes_up_for_a_promise_or_takes_one_back(priority):
    """However low the promised one's is, or high the other's."""
    world = World(workers=1, policy="hocket")
    mine, others = min(priority, 0), max(priority, 0)
    assert admitted(world, request("firm", slo_us=1_200_000, firm=True, priority=mine))
    for i in range(2):
        asked = request(f"r{i}", slo_us=1_000_000, at_us=world.now_us, priority=others)
        admitted(world, asked, on_time=True)
    assert drained(world)["firm"]


@pytest.mark.parametrize("priority", [-100, -11, -10])
def test_a_low_priority_has_its_deadline_met_where_nobody_else_is(priority):
    world = World(workers=1, policy="hocket")
    admitted(world, request("soft", slo_us=3_000_000, priority=priority), on_time=True)
    assert drained(world) == {"soft": True}


def test_a_forecast_changes_nothing():
    """Not what is planned, and not what is answered next."""
    asked = [request(f"q{i}", px=1024, slo_us=3_000_000 + i, firm=i % 2 == 0) for i in range(6)]
    digests = []
    for curious in (True, False):
        world = World(workers=3, policy="hocket")
        for i in range(8):
            if curious:
                first = world.scheduler.forecast(asked, world.now_us)
                assert first == world.scheduler.forecast(asked, world.now_us)
            admitted(world, request(f"r{i}", slo_us=2_000_000 + i, firm=i % 3 == 0), on_time=True)
        drained(world)
        digests.append([p.digest for p in world.plans])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("slo_us", [900_000, 2_500_000, 10_000_000])
@pytest.mark.parametrize("firm", [True, False])
def test_a_burst_is_answered_as_one_by_one(slo_us, firm):
    burst = [request(f"r{i:02d}", (256, 512, 1024)[i % 3], slo_us, firm=firm) for i in range(40)]
    together = World(workers=8, policy="hocket").scheduler.forecast(burst, 0)
    world, alone = World(workers=8, policy="hocket"), []
    for one in burst:
        (told,) = world.scheduler.forecast((one,), 0)
        alone.append(told)
        late = (told.finish_us_p95 if firm else told.finish_us) > one.deadline_us
        world.observe(Arrived(at_us=0, request=one, promised_us=told.finish_us, on_time=not late))
    pairs = list(zip(burst, together, alone, strict=True))
    yes = [[f.finish_us <= r.deadline_us for f in told] for r, *told in pairs]
    assert sum(a != b for a, b in yes) <= 2
    ratios = [
        a.finish_us / b.finish_us for (_, a, b), on in zip(pairs, yes, strict=True) if all(on)
    ]
    assert 0.97 < sum(ratios) / len(ratios) < 1.15 and max(ratios) < 1.8 and min(ratios) > 0.6


def test_firm_promises_hold_in_a_crowd():
    """Twice of what eight workers can carry for a while."""
    rows = [(i * 120_000, (256, 512, 1024, 2048)[i % 4], 3_000_000) for i in range(60)]
    kept = {}
    for firm in (0.0, 1.0):
        one = msgspec.structs.replace(
            case(rows, policy="hocket"), promises=PromiseSpec(firm=firm, refuse=False)
        )
        result = run(one)
        told = {f.request.id: f.on_time for f in result.facts if isinstance(f, Arrived)}
        ends = {e.request: e for e in result.ended}
        kept[firm] = [ends[r].on_time for r, yes in told.items() if yes]
        figures = result.promises
        assert (figures.promised, figures.kept) == (len(kept[firm]), sum(kept[firm]))
    assert all(kept[1.0]) and len(kept[1.0]) > 10
    assert not all(kept[0.0])


def test_who_is_refused_at_the_door_never_arrives():
    rows = [(i * 10_000, 2048, 5_000_000) for i in range(12)]
    one = msgspec.structs.replace(case(rows, policy="hocket"), promises=PromiseSpec(firm=1.0))
    result = run(one)
    assert result.refused and len(result.ended) + len(result.refused) == 12
    assert result.summary.rejected == len(result.refused)


# ------------------------------------------------------------------------------ calibration


def told(book, name, latency_us, ended_us, firm=True, on_time=True):
    asked = request(name, slo_us=1_000_000, firm=firm)
    book.told(Arrived(at_us=0, request=asked, promised_us=latency_us, on_time=on_time))
    book.ended(
        Ended(
            request=name,
            outcome=Outcome.DONE,
            at_us=ended_us,
            on_time=ended_us <= 1_000_000,
            steps_done=10,
        )
    )


def test_the_tail_of_a_forecast_follows_what_came_of_the_last_ones():
    book = Commitments()
    for i in range(100):
        told(book, f"r{i}", 100_000, 100_000 + 1_000 * i, firm=False)
    soft = request("next", slo_us=1_000_000)
    assert book.finish_us_p95(soft, 0, 100_000) == pytest.approx(194_000, abs=2_000)
    for i in range(300):
        told(book, f"s{i}", 100_000, 90_000, firm=False)
    assert book.finish_us_p95(soft, 0, 100_000) == 100_000, "only the newest count"


def test_broken_promises_widen_the_margin_and_kept_ones_narrow_it():
    book = Commitments()
    firm = request("next", slo_us=1_000_000, firm=True)
    assert book.finish_us_p95(firm, 0, 990_000) <= 1_000_000
    told(book, "broken", 900_000, 1_100_000)
    assert book.margin == pytest.approx(MARGIN_GAIN * (1 - FIRM_BROKEN))
    assert book.finish_us_p95(firm, 0, 990_000) > 1_000_000, "not promised any more"
    for i in range(1000):
        told(book, f"r{i}", 500_000, 500_000)
    assert book.margin == 0.0
    figures = book.figures()
    assert (figures.firm_promised, figures.firm_kept, figures.on_time) == (1001, 1000, 1000)


def test_cancelled_requests_and_repeats_teach_nothing():
    book = Commitments()
    asked = request("r", slo_us=1_000_000, firm=True)
    for promised_us in (100_000, 900_000):
        book.told(Arrived(at_us=0, request=asked, promised_us=promised_us, on_time=True))
    ended = Ended(request="r", outcome=Outcome.CANCELLED, at_us=5, on_time=False, steps_done=0)
    book.ended(ended)
    book.ended(ended)
    assert book.figures().promised == 0 and book.margin == 0.0


def test_what_is_no_share_of_requests_is_said():
    with pytest.raises(ValueError, match=r"promises\.firm"):
        PromiseSpec(firm=1.5)
