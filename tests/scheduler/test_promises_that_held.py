"""Ways in which firm promises were broken; each of these was red before it was mended."""

from pathlib import Path

import msgspec
import pytest

from bench.sim.experiment import load_experiment
from bench.sim.loop import run
from control.scheduler.policies.hocket.kernel import PROMISED_WORTH

from .driving import World
from .small_pods import LIMITS, given_up, job, played, tables
from .test_firm_promises import admitted, drained, request

CASE = Path(__file__).parents[2] / "bench" / "cases" / "firm-promises.toml"
PROMISED = 1.0 + PROMISED_WORTH


def test_a_newcomer_may_not_cost_a_promise_whose_guard_is_used_up():
    """Nothing is in hand any more, since a report came late: the promise counts all the same."""
    world = World(workers=1, policy="hocket")
    assert admitted(world, request("old", slo_us=1_200_000, firm=True))
    (encode,) = world.plan().assignments
    world.over(encode)
    world.now_us = 490_000
    world.plan()
    new = request("new", px=256, steps=2, slo_us=350_000, at_us=world.now_us)
    assert not admitted(world, new)
    assert drained(world)["old"]


def test_best_effort_that_waited_long_lets_a_promise_go_first():
    """It takes a worker before all others, but not where that costs a promise."""
    impatient = {"best_effort_wait_us_max": 1_000, "best_effort_slowdown": 0.0}
    world = World(workers=1, policy="hocket", policy_settings=impatient)
    world.arrive("aged", px=2048, steps=2)
    (encode,) = world.plan().assignments
    world.over(encode)
    world.now_us += 2_000
    firm = request("firm", slo_us=1_200_000, at_us=world.now_us, firm=True)
    assert admitted(world, firm)
    assert drained(world)["firm"]


@pytest.mark.parametrize("operations_max", [1, 60, 200, 100_000])
def test_a_spent_budget_costs_no_promise_before_what_was_not_promised(operations_max):
    """One worker, 12 jobs that end just in time, and one that was promised among them."""
    tab = tables([1], [100])
    rows = [job(200 + 100 * i, steps=1) for i in range(12)]
    rows.insert(8, job(950, steps=3, weight=PROMISED))
    limits = LIMITS._replace(operations_max=operations_max)
    on, _ = given_up(rows, 1, tab, limits)
    assert on[8]
    finish, *_ = played(rows, 1, tab, on=on)
    assert finish[8] > 0


def test_what_a_promise_costs_no_one_is_not_given_up_for_it():
    """It is lost with them and without them."""
    tab = tables([1], [100])
    rows = [job(200, steps=2, weight=PROMISED), job(300, steps=1)]
    rows.append(job(310, steps=3, weight=PROMISED))
    assert given_up(rows, 1, tab)[0] == [1, 1, 0]


@pytest.mark.parametrize(
    ("cell", "seed", "requests"),
    [
        # Best effort was checked against a guard that was used up already.
        (("tetriserve-uniform", 12, 1.0), 0, 6),
        (("mixed-burst", 8, 1.2), 12, 40),
    ],
)
def test_promises_hold_in_traces_in_which_they_did_not(cell, seed, requests):
    experiment = load_experiment(CASE)
    wanted = dict(zip(("workload", "rate", "slo_scale"), cell, strict=True), firm=1.0)
    (spec,) = (s for s in experiment.runs([seed]) if wanted.items() <= s.cell.items())
    one = spec.to_case()
    result = run(msgspec.structs.replace(one, trace=one.trace[:requests]))
    told = result.promises
    assert told.firm_kept == told.firm_promised > requests / 2
