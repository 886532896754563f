"""Whole runs: invariants under random workloads and faults, determinism, end to end."""

from itertools import pairwise

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.sim.case import ClusterSpec, FaultSpec
from bench.sim.loop import run
from control.scheduler.core import Scheduler
from control.scheduler.facts import in_order
from control.scheduler.schedule_log import HeaderLine, RunLine
from control.scheduler.values import (
    Arrived,
    DrainRequested,
    ModelFacts,
    Outcome,
    WorkerLost,
    WorkerUp,
)

from .driving import PROFILES, case

ROWS = [(i * 70_000, (256, 512, 1024, 2048)[i % 4], 3_000_000) for i in range(12)]
STEPS = 6

rows = st.lists(
    st.tuples(
        st.integers(0, 2_000_000),
        st.sampled_from([256, 512, 1024, 2048]),
        st.sampled_from([1, 500_000, 2_000_000, 60_000_000]),
    ),
    min_size=1,
    max_size=8,
)
ways = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(
            ["tetriserve", "fixed-1", "fixed-2", "hocket", "edf", "genserve"]
        ),
        "rounds": st.booleans(),
        "amend": st.booleans(),
        "lead_us": st.sampled_from([0, 5_000, 40_000]),
        "straddle": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    }
)
faults = st.lists(
    st.builds(
        FaultSpec,
        at_us=st.integers(1, 4_000_000),
        kind=st.sampled_from(["lost", "up", "beat", "drain", "cancel", "fail"]),
        worker=st.sampled_from(["w0000", "w0001", "w0002", "w0003"]),
        request=st.sampled_from(["r0", "r1", "r2"]),
    ),
    max_size=8,
)


def check_plans(result):
    """Sequences and rounds only grow; attempts too; groups stand in cluster order."""
    sequences = [a.sequence for p in result.plans for a in p.assignments]
    assert sequences == sorted(set(sequences))
    rounds = [p.round for p in result.plans]
    assert rounds == sorted(rounds)
    attempts = {}
    for plan in result.plans:
        for a in plan.assignments:
            assert a.workers == tuple(sorted(set(a.workers))) and a.steps >= 1
            assert a.layout.degree == len(a.workers)
            for member in a.batch:
                assert member.attempt >= attempts.get(member.request, 0)
                attempts[member.request] = member.attempt
                assert bool(member.holders) == (a.node != "text")


def check_log(result):
    """No worker twice at once; the steps of finished requests in order, each exactly once."""
    lines = [x for x in result.log.lines() if isinstance(x, RunLine)]
    by_worker, steps = {}, {}
    for line in lines:
        for gpu in line.gpus:
            by_worker.setdefault(gpu, []).append((line.start_us, line.end_us))
        if type(line) is RunLine and line.node == "dit":
            steps.setdefault(line.requests[0], []).append(line)
    for spans in by_worker.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    done = {e.request for e in result.ended if e.outcome is Outcome.DONE}
    for request in done:
        runs = sorted(steps[request], key=lambda r: r.start_us)
        ran = [s for r in runs for s in range(r.first_step, r.first_step + r.steps)]
        assert ran == list(range(STEPS))
    return done


def check_usable(result):
    """Nothing new for lost or draining workers; a drain outlives its worker."""
    lost, draining = set(), set()
    facts = list(result.facts)
    for plan in result.plans:
        while facts and facts[0].at_us <= plan.now_us:
            match facts.pop(0):
                case WorkerLost(worker=worker):
                    lost.add(worker)
                case DrainRequested(worker=worker, draining=True):
                    draining.add(worker)
                case DrainRequested(worker=worker):
                    draining.discard(worker)
                case WorkerUp(worker=worker):
                    lost.discard(worker)
                case _:
                    pass
        for a in plan.assignments:
            assert (lost | draining).isdisjoint(a.workers)


LATE_TEXT = {  # a group whose job came from other workers, and a text behind it
    "policy": "tetriserve",
    "rounds": True,
    "amend": False,
    "lead_us": 0,
    "straddle": 0.0,
}


@settings(max_examples=60, deadline=None)
@given(rows=rows, ways=ways)
@example(rows=[(0, 256, 1)] * 2 + [(0, 1024, 1)] * 2 + [(433_600, 256, 1)], ways=LATE_TEXT)
def test_without_faults_plans_come_true(rows, ways):
    result = run(case(rows, steps=STEPS, **ways))
    check_plans(result)
    assert check_log(result) == {f"r{i}" for i in range(len(rows))}
    assert all(e.steps_lost == 0 for e in result.ended)
    spans = {}
    for plan in result.plans:
        for a in plan.assignments:
            for worker in a.workers:
                spans.setdefault(worker, []).append((a.start_us, a.end_us))
    for planned in spans.values():
        assert all(x[1] <= y[0] for x, y in pairwise(planned))


@settings(max_examples=120, deadline=None)
@given(rows=rows, ways=ways, faults=faults)
def test_faults_cost_steps_and_never_a_request(rows, ways, faults):
    known = {f"r{i}" for i in range(len(rows))}
    faults = [f for f in faults if f.kind != "cancel" or f.request in known]
    rescue = [FaultSpec(at_us=5_000_000, kind="up", worker=f"w000{i}") for i in range(2)]
    result = run(case(rows, steps=STEPS, faults=(*faults, *rescue), **ways))
    check_plans(result)
    check_usable(result)
    done = check_log(result)
    cancelled = {e.request for e in result.ended if e.outcome is Outcome.CANCELLED}
    assert len(result.ended) == len(known), "every request ends exactly once"
    assert done | cancelled == known
    assert cancelled <= {f.request for f in faults if f.kind == "cancel"}


def test_same_facts_same_digests_and_one_changed_fact_changes_one():
    first, second = run(case(ROWS)), run(case(ROWS))
    assert first.digests == second.digests and len(set(first.digests)) > 10
    changed = [*ROWS[:5], (ROWS[5][0] + 1, *ROWS[5][1:]), *ROWS[6:]]
    assert run(case(changed)).digests != first.digests


def replay(result, facts, settings_, profile):
    """Shows recorded facts to a new scheduler at the recorded planning times."""
    scheduler = Scheduler(settings_, profile)
    waiting = list(facts)
    digests = []
    for plan in result.plans:
        while waiting and waiting[0].at_us <= plan.now_us:
            scheduler.observe(waiting.pop(0))
        digests.append(scheduler.plan(plan.now_us).digest)
    return tuple(digests)


def test_a_recorded_run_replays():
    one = case(ROWS, faults=(FaultSpec(at_us=600_000, kind="lost", worker="w0001"),))
    result = run(one)
    assert replay(result, result.facts, one.settings, one.profile) == result.digests
    tampered = [
        msgspec.structs.replace(f, request=msgspec.structs.replace(f.request, steps=7))
        if isinstance(f, Arrived) and f.request.id == "r3"
        else f
        for f in result.facts
    ]
    assert replay(result, tampered, one.settings, one.profile) != result.digests


def test_end_to_end_with_a_crash_and_a_newcomer():
    faults = (
        FaultSpec(at_us=500_000, kind="lost", worker="w0002"),
        FaultSpec(at_us=900_000, kind="up", worker="w0009"),
    )
    result = run(case(ROWS, steps=28, faults=faults))
    assert {e.outcome for e in result.ended} == {Outcome.DONE} and len(result.ended) == 12
    assert any("w0009" in a.workers for p in result.plans for a in p.assignments)
    assert any(e.degree_changes for e in result.ended)
    header = result.log.lines()[0]
    assert isinstance(header, HeaderLine) and header.workers[-1] == "w0009"


def test_fixed_keeps_its_degree_and_workers():
    result = run(case(ROWS, policy="fixed-2"))
    groups = {}
    for plan in result.plans:
        for a in plan.assignments:
            if a.node == "dit":
                groups.setdefault(a.batch[0].request, set()).add(a.workers)
    assert {len(g) for used in groups.values() for g in used} == {2}
    assert all(e.degree_changes == 0 for e in result.ended)


def emoji(rows_, workers=4):
    """A Case of the embedded model on CPU workers."""
    one = case(rows_, workers=workers, steps=12)
    trace = tuple(msgspec.structs.replace(r, model="hocket-emoji") for r in one.trace)
    models = (ModelFacts(name="hocket-emoji", degrees=(1, 2, 4)),)
    return msgspec.structs.replace(
        one,
        trace=trace,
        profile_csv=(PROFILES / "hocket-emoji_cpu.csv").read_text(),
        cluster=ClusterSpec(workers=workers, gpu="cpu", models=models),
    )


def test_the_embedded_model_is_split_only_where_that_is_faster():
    for px in (64, 128, 256):  # four workers on two cores are slower than two at any size
        result = run(emoji([(0, px, 5_000_000)]))
        widths = {len(a.workers) for p in result.plans for a in p.assignments if a.node == "dit"}
        assert max(widths) == 2, (px, widths)


def test_facts_of_one_instant_have_one_order():
    facts = list(run(case(ROWS)).facts)
    assert in_order(reversed(facts)) == facts
