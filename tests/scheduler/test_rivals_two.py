"""DiFlow's rules one by one, the weights it shares, and a run of all rivals of its kind."""

from __future__ import annotations

import pytest

from bench.sim.case import Case, ClusterSpec
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from control.scheduler.books.cluster import Worker
from control.scheduler.books.loads import LoadTable
from control.scheduler.books.residency import Residency
from control.scheduler.settings import Settings
from control.scheduler.values import DIT, TEXT, VAE, ModelFacts, Outcome

from .desk import BASE, CANNY, LOADS, MODELS, MS, OTHER, ROWS, TABLE, Desk, brief, served

# ------------------------------------------------------------------------------------ weights


def worker(memory_mib, loads=TABLE):
    models = {facts.name: facts for facts in served(MODELS, loads)}
    return Worker("w", "", "g", "1", models, memory_mib=memory_mib)


def loaded(residency, w, model, node):
    loads = residency.bring(w, model, node, 1)
    assert {(x.model, x.node) for x in loads} <= {(model, node)}
    return [(x.part, x.load_us, x.evict) for x in loads]


def test_models_of_one_base_share_its_weights():
    residency, w = Residency(LoadTable.from_csv(LOADS)), worker(100)
    assert residency.load_us(w, CANNY, DIT) == 5_300
    assert loaded(residency, w, CANNY, DIT) == [
        ("base/dit", 5_000, ()),
        ("base/controlnet-canny", 300, ()),
    ]
    assert residency.load_us(w, BASE, DIT) == 0 and not loaded(residency, w, BASE, DIT)
    assert loaded(residency, w, CANNY, TEXT) == [("base/text", 1_000, ())]
    assert residency.footprint_mib(w, CANNY) == 66


def test_rows_of_its_own_end_the_sharing():
    own = LoadTable.from_csv(LOADS + "base+canny,g,dit,9000,55\n")
    residency, w = Residency(own), worker(200, own)
    loaded(residency, w, BASE, DIT)
    assert loaded(residency, w, CANNY, DIT) == [("base+canny/dit", 9_000, ())]


def test_preloaded_weights_cost_nothing_once_and_yield_like_others():
    residency, w = Residency(LoadTable.from_csv(LOADS)), worker(70)
    for node in (TEXT, DIT, VAE):
        residency.preload(w, BASE, node)
    residency.preload(w, OTHER, TEXT)  # does not fit
    assert residency.load_us(w, BASE, DIT) == 0 and residency.load_us(w, OTHER, TEXT) == 2_000
    assert loaded(residency, w, BASE, DIT) == [("base/dit", 0, ())], "told once"
    assert not loaded(residency, w, BASE, DIT)
    assert loaded(residency, w, OTHER, TEXT) == [("other/text", 2_000, ("base/text", "base/vae"))]


def test_who_is_late_is_not_idle():
    desk = Desk("fixed-1", workers=1)
    (encode,) = desk.arrive("a")
    desk.now_us = encode.end_us + 1
    assert desk.arrive("b") == [] and desk.plan() == []
    desk.flights.clear()
    desk.over(encode)
    assert len(desk.plan()) == 1
    pair = Desk("fixed-1", workers=2)
    (encode,) = pair.arrive("a")
    pair.now_us = encode.end_us + 1
    assert pair.plan() == [], "its latent is not there yet"


# ------------------------------------------------------------------------------------ DiFlow


def test_an_idle_cluster_runs_both_branches_at_once_step_by_step():
    desk = Desk("diflow")
    desk.arrive("a")
    assert brief(desk.next()) == [(DIT, ("a",), ("w0", "w1"), 1)]
    assert desk.log[-1].reason == "latency"
    desk.run()
    assert [n for n, _ in desk.places("a")] == [TEXT, DIT, DIT, VAE]


def test_a_busy_cluster_merges_into_batches():
    desk = Desk("diflow")
    for name in "abc":
        desk.arrive(name, plan=False)
    assert brief(desk.plan())[0] == (TEXT, ("a",), ("w0",), 1), "two more fit on two workers"
    desk = Desk("diflow", workers=1)
    for name in "abcd":
        desk.arrive(name, plan=False)
    assert brief(desk.plan()) == [(TEXT, ("a", "b", "c", "d"), ("w0",), 1)]
    assert desk.log[-1].reason == "throughput"
    assert brief(desk.next()) == [(DIT, ("a", "b", "c", "d"), ("w0",), 1)]


def test_the_other_branch_of_the_head_counts():
    """Two steps are four nodes, one being placed: three are more than two workers."""
    desk = Desk("diflow")
    desk.arrive("a", plan=False)
    desk.arrive("b")
    assert brief(desk.next()) == [(DIT, ("a", "b"), ("w0",), 1)]
    wide = Desk("diflow", workers=4)
    wide.arrive("a", plan=False)
    wide.arrive("b")
    assert [len(a.workers) for a in wide.next()] == [2, 2]


def test_caps_are_the_sources_where_it_has_them():
    desk = Desk("diflow", workers=1, models=("flux.1-dev",))
    for name in "abcd":
        desk.arrive(name, model="flux.1-dev", plan=False)
    assert [len(a.batch) for a in desk.plan()] == [2], "T5: 1/2"
    free = Desk("diflow", workers=1, models=("flux.1-dev",), throughput_cap=3)
    for name in "abcd":
        free.arrive(name, model="flux.1-dev", plan=False)
    assert [len(a.batch) for a in free.plan()] == [3]


def test_modes_can_be_fixed():
    desk = Desk("diflow", workers=1, mode="latency")
    for name in "abcd":
        desk.arrive(name, plan=False)
    assert [len(a.batch) for a in desk.plan()] == [1]
    desk = Desk("diflow", workers=1, mode="throughput")
    desk.arrive("a")
    assert desk.log[-1].reason == "throughput"


def test_a_node_goes_where_its_weights_are():
    desk = Desk("diflow", memory=100, preload=False, spread=1)
    desk.arrive("a", model=OTHER)
    desk.arrive("b", model=BASE)
    desk.run()
    assert {w for _, w in desk.places("a")} == {("w0",)}
    desk.arrive("c", model=BASE)
    desk.run()
    assert {w for _, w in desk.places("c")} == {("w1",)}
    assert sum(x.load_us for x in desk.loads) == 9_200 + 6_100


def test_preloaded_workers_load_nothing():
    desk = Desk("diflow", memory=100, models=(BASE, CANNY))
    desk.arrive("a")
    desk.arrive("b", model=CANNY)
    desk.run()
    assert sum(x.load_us for x in desk.loads) == 0 and len(desk.ended) == 2


def test_a_short_queue_may_grow():
    desk = Desk("diflow", workers=1, queue_us=20 * MS, latency_cap=1, throughput_cap=1)
    desk.arrive("a")
    assert brief(desk.arrive("b")) == [(TEXT, ("b",), ("w0",), 1)]
    assert desk.arrive("c") == [], "40 ms are in the queue"
    strict = Desk("diflow", workers=1, queue_us=19 * MS)
    strict.arrive("a")
    assert strict.arrive("b") == []


def test_admission_measures_the_work_inside_against_the_slack():
    alone_us, slack_us = 260 * MS, 200 * MS  # 20 + 2 x 100 + 40; the newcomer's own is not counted
    desk = Desk("diflow")
    desk.arrive("a", slo_us=alone_us + slack_us)
    desk.arrive("b", slo_us=1)
    assert not desk.ended, "fewer inside than workers"
    desk.arrive("c", slo_us=alone_us + 259 * MS)
    assert desk.ended["c"].outcome is Outcome.REJECTED and desk.ended["c"].reason == "EARLY_ABORT"
    desk.arrive("d", slo_us=alone_us + 260 * MS)
    assert "d" not in desk.ended
    desk.arrive("e", slo_us=alone_us + 389 * MS)
    assert "e" in desk.ended, "three inside have 780 ms for two workers"
    desk.arrive("f", slo_us=alone_us + 390 * MS)
    desk.run()
    assert sorted(r for r, e in desk.ended.items() if e.outcome is Outcome.DONE) == list("abdf")


def test_without_admission_nobody_is_turned_away():
    desk = Desk("diflow", admission=False)
    for name in "abcd":
        desk.arrive(name, slo_us=1)
    desk.run()
    assert {e.outcome for e in desk.ended.values()} == {Outcome.DONE}


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    "policy", ["diffusers", "diffusers-c", "diffusers-s", "monolith", "diflow", "disagfusion"]
)
@pytest.mark.parametrize("memory_mib", [0, 100])
def test_every_request_ends_and_plans_repeat(policy, memory_mib):
    trace = tuple(
        TraceRequest(
            id=f"r{i}",
            arrival_us=i * 30 * MS,
            model=MODELS[i % 3],
            workflow="txt2img",
            width=512,
            height=512,
            frames=1,
            steps=1 + i % 4,
            slo_us=800 * MS,
            priority=0,
        )
        for i in range(60)
    )
    facts = tuple(ModelFacts(name=m, degrees=(1, 2), batch_max=4) for m in MODELS)
    case = Case(
        cluster=ClusterSpec(workers=5, gpu="g", models=facts, memory_mib=memory_mib),
        profile_csv=ROWS,
        loads_csv=LOADS,
        trace=trace,
        settings=Settings(policy=policy),
    )
    first = run(case)
    assert sorted(e.request for e in first.ended) == sorted(r.id for r in trace)
    assert sum(e.outcome is Outcome.DONE for e in first.ended) > 20
    assert run(case).digests == first.digests
