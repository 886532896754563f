"""What firm promises may cost a plan and a forecast, counted in operations of the kernel."""

import numpy as np
import pytest

from control.scheduler.policies.hocket.forecast import Forecaster
from control.scheduler.policies.hocket.guards import relax
from control.scheduler.policies.hocket.keeping import keep
from control.scheduler.policies.hocket.kernel import (
    DEADLINE,
    FINISH,
    GUARD,
    PROMISED_WORTH,
    scratch,
)
from control.scheduler.values import Arrived

from .driving import World
from .small_pods import EXACT, LIMITS, given_up, job, matrix, played, tables
from .test_firm_promises import request

ROLLOUTS = 12  # that come on top of a budget, at most


def queue(count, guard):
    """One worker, one step each: all end at their deadlines, and too late for a guard."""
    rows = [
        job(100 * (i + 1) - guard, steps=1, weight=1.0 + PROMISED_WORTH, guard=guard)
        for i in range(count)
    ]
    kept = [job(100 * (i + 1), steps=1) for i in range(count)]
    tab = tables([1], [100])
    *_, operations = played(kept, 1, tab)
    return rows, tab, operations


@pytest.mark.parametrize("operations_max", [1_000, 100_000])
def test_giving_up_spends_many_guards_together(operations_max):
    rows, tab, one = queue(200, 60)
    limits = LIMITS._replace(operations_max=operations_max)
    on, used = given_up(rows, 1, tab, limits)
    assert all(on)
    assert used <= operations_max + ROLLOUTS * one < 200 * one


@pytest.mark.parametrize("operations_max", [0, 1_000, 100_000])
def test_relaxing_spends_many_guards_together(operations_max):
    rows, tab, one = queue(200, 60)
    jobs, on, space = matrix(rows), np.ones(200, np.int64), scratch(200)
    relaxed, used = relax(0.0, 1, jobs, on, tab, EXACT, operations_max, space)
    assert relaxed == 200 and not jobs[:, GUARD].any()
    assert (space.floats[FINISH] > 0.0).all()
    assert used <= operations_max + ROLLOUTS * one < 200 * one


def test_within_its_budget_the_first_spends_its_guard_alone():
    """Its step saves whoever is behind it."""
    rows, tab, _ = queue(3, 60)
    rows += [job(1_000, steps=1, weight=1.0 + PROMISED_WORTH, guard=60)]
    jobs, on, space = matrix(rows), np.ones(4, np.int64), scratch(4)
    relaxed, _ = relax(0.0, 1, jobs, on, tab, EXACT, 100_000, space)
    assert relaxed == 3 and jobs[3, GUARD] == 60


def late_world(promises, soft=0, steps=20, spare_us=2_500_000):
    """Eight workers with as many promises as they can just keep; then one of them is lost."""
    world = World(workers=8, policy="hocket")
    for i in range(promises):
        slo_us = spare_us + 1_420_000 * (i // 8 + 1)
        tell(world, request(f"f{i:03d}", steps=steps, slo_us=slo_us, firm=True))
    for i in range(soft):
        tell(world, request(f"s{i:03d}", steps=steps, slo_us=30_000_000 + i * 1_000_000))
    for _ in range(3):
        world.plan()
        flights = world.scheduler.outstanding()
        world.over(min(flights, key=lambda a: (a.end_us, a.sequence)))
    world.lose("w3")
    return world


def tell(world, asked):
    world.observe(Arrived(at_us=world.now_us, request=asked, promised_us=1, on_time=True))


def test_a_plan_with_many_used_up_guards_costs_a_few_rollouts():
    """One rollout of these takes 300,000 operations; each late promise took one."""
    world = late_world(400, soft=60)
    world.plan()
    assert 0 < world.scheduler.operations < 4_000_000


def forecaster(world):
    planner = world.scheduler._planner
    return Forecaster(
        world.scheduler._ledger,
        planner._pods,
        planner._maker,
        planner._rules,
        planner._limits,
        float(planner._read["echo_loss"]),
        world.now_us,
    )


def test_a_forecast_with_many_used_up_guards_costs_a_few_rollouts():
    world = late_world(400, soft=60)
    world.plan()
    asked = forecaster(world)
    asked.ask([], [request("new", slo_us=30_000_000, firm=True)])
    assert 0 < asked.operations < 5_000_000


def test_used_up_guards_are_no_reason_to_refuse_a_whole_burst():
    """One of it would cost a promise; the other comes after all promises."""
    world = late_world(100, spare_us=1_500_000)
    world.plan()
    burst = [request("tight", px=1024, steps=20, slo_us=10_000_000, firm=True)]
    burst.append(request("far", slo_us=200_000_000, firm=True))
    tight, far = forecaster(world).ask([], burst)
    assert tight.late and not far.late


# ------------------------------------------------------------------------------ judging starts


class Pod:
    """One worker that two promises need at once, and searches that note what nobody else does."""

    def __init__(self, costs=0, gives_up_from=99):
        world = World(workers=1, policy="hocket")
        for i in range(2):
            tell(world, request(f"f{i}", slo_us=1_000_000, firm=True))
        tell(world, request("soft", slo_us=3_000_000))
        self.planner = world.scheduler._planner
        ledger = world.scheduler._ledger
        self.planner._pods.follow(ledger, ledger.touched)
        (self.pod,) = self.planner._pods.pods
        self.roster = self.planner._maker.make(ledger, self.pod, 0)
        self.ledger, self.costs, self.gives_up_from = ledger, costs, gives_up_from
        self.given, self.seen = [], []

    def known(self):
        hopeful = [e.hopeful for e in self.roster.entries]
        return (self.roster.jobs.tolist(), hopeful, self.pod.retried)

    def starts(self, limits):
        self.given.append(limits.operations_max)
        self.seen.append(self.known())
        wishes, _ = self.planner._starts(self.ledger, self.pod, self.roster, limits, 0)
        nth = len(self.given)
        self.pod.retried = (nth, nth)
        self.roster.jobs[:, DEADLINE] += nth
        self.roster.jobs[:, GUARD] = 0.0
        for entry in self.roster.entries:
            entry.hopeful = entry.tracked.promised or nth == 1
        self.roster.entries[0].hopeful = nth < self.gives_up_from
        return wishes, self.costs

    def kept(self):
        limits = self.planner._limits
        return keep(self.pod, self.roster, self.starts, limits, self.planner._rules, 0)


def test_the_pod_knows_what_the_chosen_search_noted():
    """None of three saves both promises, so the first is taken, and its notes with it."""
    pod = Pod()
    pod.kept()
    assert len(pod.given) == 3
    assert pod.seen[0] == pod.seen[1] == pod.seen[2], "each starts from the same"
    assert pod.pod.retried == (1, 1) and pod.roster.entries[-1].hopeful


def test_judging_counts_against_the_budget_of_the_next_search():
    pod = Pod()
    _, operations = pod.kept()
    first, second, third = pod.given
    assert first > second > third > first - operations


def test_who_has_spent_the_budget_searches_no_more():
    pod = Pod(costs=LIMITS.operations_max)
    wishes, operations = pod.kept()
    assert len(pod.given) == 1 and wishes
    assert operations > LIMITS.operations_max, "what was found is judged all the same"


def test_a_search_that_gives_up_a_promise_saves_none_by_that():
    """The second would have both on time, since it does not look at one of them."""
    pod = Pod(gives_up_from=2)
    pod.kept()
    assert len(pod.given) == 3
    assert all(e.hopeful for e in pod.roster.entries)
