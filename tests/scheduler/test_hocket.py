"""hocket as a policy: what it preempts, batches, moves, fills, and never forgets."""

import msgspec
import pytest

from bench.sim.case import Case, ClusterSpec, FaultSpec
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from control.scheduler.schedule_log import LostLine, RunLine
from control.scheduler.settings import Settings
from control.scheduler.values import (
    DIT,
    Arrived,
    DrainRequested,
    ModelFacts,
    Outcome,
    Request,
    Shape,
    WorkerUp,
)

from .driving import World, case, only
from .mixed import MIXED_CSV, PIC, VID

OTHER = ModelFacts(name="other")
MINUTE_US = 60_000_000


def hocket(rows, *, policy_settings=None, **options):
    return run(case(rows, policy="hocket", policy_settings=policy_settings or {}, **options))


def runs(result, request=None, node=None):
    """What ran, in time; of one request and one node, or of all."""
    lines = [x for x in result.log.lines() if type(x) is RunLine]
    lines.sort(key=lambda x: (x.start_us, x.gpus))
    return [
        x
        for x in lines
        if (request is None or request in x.requests) and (node is None or x.node == node)
    ]


def ends(result):
    return {e.request: e for e in result.ended}


def drained(world):
    """Plans and ends assignments as predicted, until nothing is under way; names of who ended."""
    for _ in range(1000):
        world.plan()
        flights = world.scheduler.outstanding()
        if not flights:
            break
        world.over(min(flights, key=lambda a: (a.end_us, a.sequence)))
    return {e.request for e in world.ended}


# ------------------------------------------------------------------------------------ one pod


def test_an_urgent_job_preempts_at_a_step_boundary_and_the_other_resumes():
    rows = [(0, 512, MINUTE_US), (200_000, 256, 500_000)]
    result = hocket(rows, steps=12, workers=1)
    assert ends(result)["r1"].on_time and ends(result)["r0"].steps_lost == 0
    urgent = runs(result, "r1")
    relaxed = [x.start_us for x in runs(result, "r0", DIT)]
    assert relaxed[0] < urgent[0].start_us < 200_000 + 55_500
    assert urgent[-1].end_us <= relaxed[-1], "it went on when the urgent one was done"
    in_between = [us for us in relaxed if urgent[0].start_us < us < urgent[-1].end_us]
    assert not in_between
    never = run(case(rows, steps=12, workers=1, policy="fixed-1"))
    assert not ends(never)["r1"].on_time


def test_the_hopeless_become_best_effort_and_finish():
    result = hocket([(0, 1024, 1), (0, 256, 1)])
    assert {e.outcome for e in result.ended} == {Outcome.DONE}
    assert not any(e.on_time for e in result.ended)
    assert {a.reason for p in result.plans for a in p.assignments} == {"best-effort"}


@pytest.mark.parametrize(("fill_step_us", "waits"), [(145_000, True), (2_000_000, False)])
def test_only_short_best_effort_steps_fill_where_a_newcomer_may_come(fill_step_us, waits):
    rows = [(0, 512, MINUTE_US), (0, 2048, 1), (0, 256, 1)]
    settings = {"fill_step_us": fill_step_us}
    result = hocket(rows, workers=3, policy_settings=settings)
    done_us = runs(result, "r0")[-1].end_us
    assert runs(result, "r2", DIT)[0].start_us < done_us
    assert (runs(result, "r1", DIT)[0].start_us >= done_us) is waits


@pytest.mark.parametrize(
    ("patience_us", "aged_workers", "served"),
    [(1_000_000, 1, True), (1_000_000, 0, False), (300_000_000, 1, False)],
)
def test_aging_gets_old_best_effort_served_under_permanent_load(patience_us, aged_workers, served):
    load = [(i * 280_000, 256, 4_000_000) for i in range(50)]
    settings = {"patience_us": patience_us, "aged_workers": aged_workers}
    result = hocket([*load, (0, 2048, 1)], steps=6, workers=1, policy_settings=settings)
    finish_us = ends(result)["r50"].at_us
    last_us = max(e.at_us for e in result.ended if e.request != "r50")
    assert (finish_us < last_us) is served
    assert len(result.ended) == 51


def test_a_job_that_goes_on_keeps_its_group():
    result = hocket([(0, 1024, 3_000_000), (0, 1024, 3_000_000)], steps=12)
    for request in ("r0", "r1"):
        groups = {x.gpus for x in runs(result, request, DIT)}
        assert len(groups) == 1 and len(*groups) == 2
        assert ends(result)[request].moves == 0


def test_the_decode_goes_to_one_who_holds_the_latent():
    result = hocket([(0, 256, MINUTE_US), (0, 512, MINUTE_US), (90_000, 256, MINUTE_US)])
    for request in ("r0", "r1", "r2"):
        before, decode = runs(result, request)[-2:]
        assert decode.node == "vae" and set(decode.gpus) <= set(before.gpus)
    assert len({runs(result, r)[-1].gpus for r in ("r0", "r1", "r2")}) == 3


@pytest.mark.parametrize("first", [0, 1])
def test_priority_wins_between_equals(first):
    one = case([(0, 512, 600_000), (0, 512, 600_000)], workers=1, policy="hocket")
    trace = tuple(
        msgspec.structs.replace(r, priority=int(i == first)) for i, r in enumerate(one.trace)
    )
    result = run(msgspec.structs.replace(one, trace=trace))
    assert [r for r, e in sorted(ends(result).items()) if e.on_time] == [f"r{first}"]


# ------------------------------------------------------------------------------------ other models


def request(name, model, px, arrival_us, slo_us, steps):
    return TraceRequest(
        id=name,
        arrival_us=arrival_us,
        model=model,
        workflow="txt2img",
        width=px,
        height=px,
        frames=1,
        steps=steps,
        slo_us=slo_us,
        priority=0,
    )


def pictures(workers, slos, models=(PIC,)):
    """Equal pictures, 20 ms apart: each takes 102 ms, ten steps of four together take 130 ms."""
    return run(
        Case(
            cluster=ClusterSpec(workers=workers, gpu="g", models=models),
            profile_csv=MIXED_CSV,
            trace=tuple(
                request(f"r{i}", "pic", 64, i // workers * 20_000, slo_us, 10)
                for i, slo_us in enumerate(slos)
            ),
            settings=Settings(policy="hocket"),
        )
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_equals_step_together_when_that_saves_them(workers):
    slos = [250_000] * 4 * workers
    result = pictures(workers, slos, (PIC, VID))
    assert all(e.on_time for e in result.ended) and len(result.ended) == 4 * workers
    assert max(x.batch for x in runs(result)) > 1
    alone = msgspec.structs.replace(PIC, batch_max=1)
    result = pictures(workers, slos, (alone, VID))
    assert sum(e.on_time for e in result.ended) <= 3 * workers and len(result.ended) == 4 * workers
    assert max(x.batch for x in runs(result)) == 1


@pytest.mark.parametrize(("slack_worth", "on_time"), [(0.001, {60}), (0.0, range(30))])
def test_slack_finds_batches_in_a_crowd_where_they_save_much(slack_worth, on_time):
    """Sixty pictures of 610 ms on two workers, one every 100 ms: too many, but for batches."""
    head = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n"
    calls = [("text", 1, 5_000), ("vae", 1, 5_000)]
    calls += [(DIT, batch, us * 1000) for batch, us in ((1, 100), (2, 110), (4, 120), (8, 150))]
    rows = [f"pic,g,{node},64,64,1,1,{batch},{us},test\n" for node, batch, us in calls]
    batching = ModelFacts(name="pic", batch_max=4)
    result = run(
        Case(
            cluster=ClusterSpec(workers=2, gpu="g", models=(batching,)),
            profile_csv=head + "".join(rows),
            trace=tuple(request(f"r{i}", "pic", 64, i * 100_000, 1_500_000, 6) for i in range(60)),
            settings=Settings(
                policy="hocket", lead_us=20_000, policy_settings={"slack_worth": slack_worth}
            ),
        )
    )
    assert len(result.ended) == 60 and sum(e.on_time for e in result.ended) in on_time


def two_models():
    """Twenty requests of two models in turn; each worker's memory has room for one of them."""
    columns = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n"
    nodes = (("text", 1_000), (DIT, 10_000), ("vae", 1_000))
    names = ("a", "b")
    calls = [f"{m},g,{n},64,64,1,1,1,{us},test\n" for m in names for n, us in nodes]
    weights = [f"{m},g,{n},50000,100\n" for m in names for n, _ in nodes]
    models = tuple(ModelFacts(name=m) for m in names)
    return Case(
        cluster=ClusterSpec(workers=2, gpu="g", models=models, memory_mib=300),
        profile_csv=columns + "".join(calls),
        loads_csv="model,gpu,node,load_us,weights_mib\n" + "".join(weights),
        trace=tuple(
            request(f"r{i}", names[i % 2], 64, i * 200_000, 2_000_000, 10) for i in range(20)
        ),
        settings=Settings(policy="hocket"),
    )


def test_two_models_settle_on_a_worker_each():
    result = run(two_models())
    assert all(e.on_time for e in result.ended) and len(result.ended) == 20
    loads = [load for p in result.plans for load in p.loads if load.load_us]
    assert [(load.model, load.node) for load in loads] == [("b", n) for n in ("text", DIT, "vae")]
    where = [{x.gpus for r in range(2 + i, 20, 2) for x in runs(result, f"r{r}")} for i in (0, 1)]
    assert len(where[0]) == len(where[1]) == 1 and where[0] != where[1]


# ------------------------------------------------------------------------------------ several pods


def hosts(rows, faults=(), steps=6):
    """32 workers on four hosts."""
    one = case(rows, steps=steps, faults=faults, policy="hocket")
    return msgspec.structs.replace(
        one, cluster=msgspec.structs.replace(one.cluster, workers=8, hosts=4)
    )


BUSY_ROWS = [(i * 15_000, (512, 1024, 2048)[i % 3], 4_000_000) for i in range(48)]


def test_a_request_is_served_in_one_pod_at_a_time():
    result = run(hosts(BUSY_ROWS))
    used = [{gpu // 8 for gpu in x.gpus} for x in runs(result)]
    assert all(len(pods) == 1 for pods in used) and {p for pods in used for p in pods} == {
        0,
        1,
        2,
        3,
    }
    assert any(len(x.gpus) > 1 for x in runs(result))
    assert all(e.outcome is Outcome.DONE for e in result.ended) and len(result.ended) == 48


def test_the_requests_of_a_lost_host_go_on_elsewhere():
    lost_us = 500_000
    faults = tuple(FaultSpec(at_us=lost_us, kind="lost", worker=f"w{i:04d}") for i in range(8, 16))
    result = run(hosts(BUSY_ROWS, faults))
    lost = [x for x in result.log.lines() if isinstance(x, LostLine)]
    assert lost and all(x.gpus[0] // 8 == 1 for x in lost), "somebody was served there"
    assert all(e.outcome is Outcome.DONE for e in result.ended) and len(result.ended) == 48
    late = [a for p in result.plans if p.now_us >= lost_us for a in p.assignments]
    assert late and not any(w in {f.worker for f in faults} for a in late for w in a.workers)


@pytest.mark.parametrize("steal", [True, False])
def test_an_idle_pod_takes_waiting_work_from_another(steal):
    """Pods of one worker: the long one is cancelled, and the short ones all wait elsewhere."""
    rows = [(0, 2048, MINUTE_US), *[(1_000, 256, MINUTE_US)] * 12]
    result = hocket(
        rows,
        workers=2,
        faults=(FaultSpec(at_us=100_000, kind="cancel", request="r0"),),
        policy_settings={"pod_workers": 1, "steal": steal},
    )
    helped = {r for x in runs(result) if x.gpus == (0,) for r in x.requests} - {"r0"}
    assert (len(helped) > 3) is steal
    assert len(result.ended) == 13


# ------------------------------------------------------------------------------------ changes


def up(world, worker, *models, incarnation="1"):
    world.observe(
        WorkerUp(
            at_us=world.now_us,
            worker=worker,
            incarnation=incarnation,
            gpu="h100",
            host="h0",
            models=models,
        )
    )


def ask(world, name, model):
    shape = Shape(width=512, height=512)
    arrived = Request(id=name, model=model, shape=shape, steps=2)
    world.observe(Arrived(at_us=world.now_us, request=arrived))


def test_a_model_that_nobody_has_waits_for_a_worker_that_does():
    world = World(workers=1, policy="hocket")
    ask(world, "foreign", "other")
    world.arrive("known", steps=2)
    assert drained(world) == {"known"}
    up(world, "w1", OTHER)
    assert world.scheduler.due(world.now_us)
    assert drained(world) == {"known", "foreign"}
    assert all(
        ("w1" in a.workers) == (a.batch[0].request == "foreign")
        for p in world.plans
        for a in p.assignments
    )


def test_requests_wait_for_the_very_first_worker():
    world = World(workers=0, policy="hocket")
    world.arrive("early", steps=2)
    assert not world.plan().assignments
    world.up("w0")
    assert drained(world) == {"early"}


def test_a_worker_that_comes_back_with_another_model_serves_that():
    world = World(workers=1, policy="hocket")
    world.arrive("before", steps=2)
    ask(world, "after", "other")
    assert only(world.plan()).batch[0].request == "before"
    up(world, "w0", OTHER, incarnation="2")
    assert drained(world) == {"after"}
    world.up("w1")
    assert drained(world) == {"after", "before"}


def test_who_waits_in_a_pod_hears_of_the_end_of_another_pods_runs():
    """A worker joins in the middle: [a b c] becomes [a ab] [b c], and b and c run on for the first
    pod when a newcomer is given to the second.
    """
    world = World(workers=0, policy="hocket", policy_settings={"pod_workers": 2})
    for worker in ("a", "b", "c"):
        world.up(worker)
    for i in range(3):
        world.arrive(f"r{i}", steps=2)
    assert len(world.plan().assignments) == 3
    world.up("ab")
    world.arrive("newcomer", steps=2)
    assert drained(world) == {"r0", "r1", "r2", "newcomer"}


def test_a_drain_that_is_taken_back_leaves_the_run_under_way_known():
    world = World(workers=1, policy="hocket")
    world.encoded("long", px=2048)
    for draining in (True, False):
        drain = DrainRequested(at_us=world.now_us, worker="w0", draining=draining)
        world.observe(drain)
        world.plan()
    world.arrive("next")
    assert not world.plan().assignments, "w0 still has its step in hand"
    assert drained(world) == {"long", "next"}
