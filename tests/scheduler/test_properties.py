"""What holds whatever happens: safety at every instant, and apart from it that everybody ends."""

import random
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.sim.case import FaultSpec
from bench.sim.costs import Costs, Straggler
from bench.sim.loop import Loop, run
from control.scheduler.policies import registry
from control.scheduler.schedule_log import LostLine, RunLine
from control.scheduler.settings import Settings
from control.scheduler.values import DIT, Outcome, StepsEnded

from .driving import FLUX, FLUX_CSV, case
from .mixed import names
from .test_simulator import check_plans, check_usable

BATCHES_CSV = FLUX_CSV.rstrip("\n") + "".join(
    f"\nflux.1-dev,h100,dit,{px},{px},1,1,{batch},{us},test"
    for px, batch, us in [(256, 2, 25_000), (256, 4, 30_000), (512, 2, 70_000), (512, 4, 100_000)]
)
STEPS = 6
FAILURES_MAX = Settings().failures_max
POLICIES = ["hocket", "edf", "tetriserve", "genserve"]
WORKERS = [f"w{i:04d}" for i in range(5)]
FAULTS = ["lost", "up", "beat", "drain", "cancel", "fail", "error", "memory"]
END_US = 6_000_000  # faults are over by then

arrivals = st.lists(
    st.tuples(
        st.integers(0, 2_000_000),
        st.sampled_from([256, 512, 1024, 2048]),
        st.sampled_from([1, 400_000, 1_500_000, 60_000_000]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=8,
)
faults = st.lists(
    st.builds(
        FaultSpec,
        at_us=st.integers(1, END_US - 1),
        kind=st.sampled_from(FAULTS),
        worker=st.sampled_from(WORKERS),
        request=st.sampled_from(["r0", "r1", "r2"]),
    ),
    max_size=8,
)
costs = st.builds(
    Costs,
    group_change_us=st.sampled_from([0, 3_000]),
    group_cold_us=st.sampled_from([0, 10_000]),
    noise=st.sampled_from([0.0, 0.1]),
    report_delay_us=st.sampled_from([0, 2_000]),
    report_us=st.sampled_from([0, 50_000]),
)
worlds = st.fixed_dictionaries(
    {
        "policy": st.sampled_from([*POLICIES, "hocket", "hocket"]),
        "lead_us": st.sampled_from([0, 20_000]),
        "group_change_us": st.sampled_from([0, 3_000]),
        "pods": st.sampled_from([2, 8]),
        "slow": st.booleans(),
        "batch_max": st.sampled_from([1, 4]),
        "seed": st.integers(0, 3),
    }
)


def drawn(arrivals, faults, costs, world, last=()):
    """The Case of what was drawn; `last` comes after all faults."""
    ways = {key: world[key] for key in ("policy", "lead_us", "group_change_us")}
    if world["policy"] == "hocket":
        ways["policy_settings"] = {"pod_workers": world["pods"], "patience_us": 1_000_000}
    rows = [row[:3] for row in arrivals]
    possible = [f for f in faults if f.kind != "cancel" or int(f.request[1:]) < len(rows)]
    one = case(rows, steps=STEPS, faults=(*possible, *last), **ways)
    slow = Straggler(worker="w0000", from_us=0, until_us=1_000_000, factor=3.0)
    models = (msgspec.structs.replace(FLUX, batch_max=world["batch_max"]),)
    return msgspec.structs.replace(
        one,
        profile_csv=BATCHES_CSV,
        cluster=msgspec.structs.replace(one.cluster, models=models),
        trace=tuple(
            msgspec.structs.replace(r, priority=row[3])
            for r, row in zip(one.trace, arrivals, strict=True)
        ),
        costs=costs,
        stragglers=(slow,) if world["slow"] else (),
        seed=world["seed"],
    )


def check_steps(result):
    """Each worker one run at a time; of those who are done, every step once, in order."""
    by_worker, steps = {}, {}
    for x in result.log.lines():
        if not isinstance(x, RunLine):
            continue
        for gpu in x.gpus:
            by_worker.setdefault(gpu, set()).add((x.start_us, x.end_us))
        if isinstance(x, LostLine) or x.node != DIT:
            continue
        firsts = x.first_step if isinstance(x.first_step, tuple) else (x.first_step,) * x.batch
        for request, first in zip(x.requests, firsts, strict=True):
            ran = [(x.start_us, step) for step in range(first, first + x.steps)]
            steps.setdefault(request, []).extend(ran)
    for spans in by_worker.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))
    for end in result.ended:
        if end.outcome is Outcome.DONE:
            assert [step for _, step in sorted(steps[end.request])] == list(range(STEPS))


def check_one_thing_at_once(result, lead_us):
    """By plans and facts alone: who is given something has nothing in hand, or with a lead one."""
    facts = list(result.facts)
    hand = {}  # sequence -> assignment
    for plan in result.plans:
        while facts and facts[0].at_us <= plan.now_us:
            fact = facts.pop(0)
            if isinstance(fact, StepsEnded) and fact.last:
                hand.pop(fact.sequence, None)
        for truncation in plan.truncations:
            called_off = [s for s, a in hand.items() if truncation.request in names(a)]
            for sequence in called_off:
                del hand[sequence]
        for a in plan.assignments:
            for worker in a.workers:
                assert sum(worker in b.workers for b in hand.values()) <= (lead_us > 0), worker
            hand[a.sequence] = a


STILL = Costs(group_change_us=0, group_cold_us=0, noise=0.0, report_delay_us=0, report_us=0)
MATES = {  # who joins a batch later, and stays longer
    "policy": "hocket",
    "lead_us": 20_000,
    "group_change_us": 0,
    "pods": 2,
    "slow": False,
    "batch_max": 4,
    "seed": 0,
}


@settings(max_examples=40, deadline=None)
@given(arrivals=arrivals, faults=faults, costs=costs, world=worlds)
@example(
    arrivals=[(i // 4, 256, slo_us, 0) for i, slo_us in enumerate((1, 1, 400_000, 1, 400_000))],
    faults=[],
    costs=STILL,
    world=MATES,
)
def test_safety(arrivals, faults, costs, world):
    """The simulator's checker raises where a rule is broken; the rest is told by plans and log."""
    result = run(drawn(arrivals, faults, costs, world))
    check_plans(result)
    check_usable(result)
    check_steps(result)
    if world["policy"] == "hocket":
        check_one_thing_at_once(result, world["lead_us"])
    ended = [e.request for e in result.ended]
    assert len(ended) == len(set(ended))


@settings(max_examples=40, deadline=None)
@given(arrivals=arrivals, faults=faults, costs=costs, world=worlds, last=st.sampled_from(WORKERS))
def test_liveness(arrivals, faults, costs, world, last):
    """Where one able worker lives on at the end, every request ends: done, or as it was asked."""
    rescue = [FaultSpec(at_us=END_US, kind=kind, worker=last) for kind in ("undrain", "up")]
    result = run(drawn(arrivals, faults, costs, world, rescue))
    outcomes = {e.request: e.outcome for e in result.ended}
    assert outcomes.keys() == {f"r{i}" for i in range(len(arrivals))}
    asked = {f.request for f in faults if f.kind == "cancel"}
    strikes = sum(f.kind in ("error", "memory") for f in faults)
    for request, outcome in outcomes.items():
        struck_out = outcome is Outcome.FAILED and strikes >= FAILURES_MAX
        cancelled = outcome is Outcome.CANCELLED and request in asked
        assert outcome is Outcome.DONE or cancelled or struck_out


ALL_LOST = tuple(FaultSpec(at_us=500_000, kind="lost", worker=w) for w in WORKERS[:4])
OTHERS = tuple(FaultSpec(at_us=9_000_000, kind="up", worker=f"w{i:04d}") for i in range(5, 9))
ROWS = [(200_000 * i, 512, 60_000_000) for i in range(6)]


@pytest.mark.parametrize("policy", registry.names())
def test_without_workers_there_is_peace_and_with_others_everybody_is_served(policy):
    alone = Loop(case(ROWS, faults=ALL_LOST, policy=policy))
    assert not all(alone.instant() for _ in range(10_000)), "it goes on for ever about nothing"
    assert len(alone.result.ended) < len(ROWS)
    result = run(case(ROWS, faults=(*ALL_LOST, *OTHERS), policy=policy))
    assert {e.outcome for e in result.ended} == {Outcome.DONE} and len(result.ended) == len(ROWS)


SUBLINEAR_CSV = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n" + "\n".join(
    f"flux.1-dev,h100,{node},512,512,1,1,{batch},{us},test"
    for node, batch, us in [
        *(("text", 1, 5_000), ("vae", 1, 5_000), ("dit", 1, 100_000), ("dit", 2, 110_000)),
        *(("dit", 3, 115_000), ("dit", 4, 120_000), ("dit", 8, 150_000)),
    ]
)


@pytest.mark.parametrize("seed", [119, 132, 189, 212, 284, 323])
def test_a_mate_of_a_mate_may_be_off_the_board_already(seed):
    """Of a batch and its successor, issued ahead with fewer jobs, one is cancelled or lost."""
    draw = random.Random(seed)
    rows = sorted(
        (draw.randrange(300_000), 512, draw.randrange(700_000, 2_500_000)) for _ in range(8)
    )
    drawn_faults = [
        FaultSpec(
            at_us=draw.randrange(100_000, 900_000),
            kind=draw.choice(["cancel", "fail", "lost"]),
            worker=f"w{draw.randrange(2):04d}",
            request=f"r{draw.randrange(8)}",
        )
        for _ in range(3)
    ]
    back = [FaultSpec(at_us=2_000_000, kind="up", worker=f"w{i:04d}") for i in range(2)]
    one = case(rows, workers=2, faults=(*drawn_faults, *back), policy="hocket", lead_us=20_000)
    models = (msgspec.structs.replace(FLUX, degrees=(1,), batch_max=4),)
    result = run(
        msgspec.structs.replace(
            one,
            profile_csv=SUBLINEAR_CSV,
            trace=tuple(msgspec.structs.replace(r, steps=draw.randrange(2, 8)) for r in one.trace),
            cluster=msgspec.structs.replace(one.cluster, models=models),
        )
    )
    assert len(result.ended) == len(rows)
    assert any(len(a.batch) > 1 for p in result.plans for a in p.assignments)


@pytest.mark.parametrize("policy", ["hocket", "genserve", "diflow"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_batches_under_faults(policy, data):
    """One shape, a batch wherever there can be one, faults all along: nobody is lost or ended
    wrongly, and no step is run twice of whom nothing happened to.
    """
    count = data.draw(st.integers(2, 8))
    rows = [(data.draw(st.integers(0, 300_000)), 512, 700_000) for _ in range(count)]
    names_ = st.sampled_from([f"r{i}" for i in range(count)])
    some = st.builds(
        FaultSpec,
        at_us=st.integers(1_000, 1_500_000),
        kind=st.sampled_from(FAULTS),
        worker=st.sampled_from(WORKERS[:2]),
        request=names_,
    )
    faults = data.draw(st.lists(some, max_size=6))
    gone = any(f.kind in ("lost", "drain", "fail") for f in faults)
    back = [
        FaultSpec(at_us=3_000_000, kind=kind, worker=w)
        for w in WORKERS[:2]
        for kind in ("undrain", "up")
        if gone
    ]
    lead_us = data.draw(st.sampled_from([0, 20_000]))
    ways = (
        {"policy_settings": {"mode": "throughput", "admission": False}}
        if policy == "diflow"
        else {}
    )
    one = case(
        sorted(rows), workers=2, faults=(*faults, *back), policy=policy, lead_us=lead_us, **ways
    )
    models = (msgspec.structs.replace(FLUX, degrees=(1, 2), batch_max=4),)
    result = run(
        msgspec.structs.replace(
            one,
            profile_csv=SUBLINEAR_CSV,
            cluster=msgspec.structs.replace(one.cluster, models=models),
            costs=data.draw(costs),
        )
    )
    check_plans(result)
    check_steps(result)
    assert len(result.ended) == count
    cancelled = {f.request for f in faults if f.kind == "cancel"}
    strikes = sum(f.kind in ("error", "memory") for f in faults)
    for end in result.ended:
        struck_out = end.outcome is Outcome.FAILED and strikes >= FAILURES_MAX
        left = end.outcome is Outcome.CANCELLED and end.request in cancelled
        assert end.outcome is Outcome.DONE or left or struck_out
    if all(f.kind in ("cancel", "beat") for f in faults):
        assert all(e.steps_lost == 0 for e in result.ended), "a cancellation costs nobody a step"
