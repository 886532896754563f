"""What is worked out once holds until something changes it, and nobody waits for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sim.case import FaultSpec
from bench.sim.loop import run
from control.scheduler.books.board import Board, Flight
from control.scheduler.books.cluster import Cluster
from control.scheduler.books.ledger import PROGRESSED_MAX, TOUCHED_MAX, Ledger
from control.scheduler.books.lifecycle import WorkerState
from control.scheduler.books.loads import LoadTable
from control.scheduler.books.moving import Moving
from control.scheduler.books.residency import Residency
from control.scheduler.books.tracker import Tracked
from control.scheduler.planning.prediction import Estimates
from control.scheduler.policies.remaining import at_most, fastest
from control.scheduler.schedule_log import RunLine, ScheduleLog
from control.scheduler.settings import Settings
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import (
    DIT,
    Arrived,
    Assignment,
    CancelRequested,
    JobProgress,
    Layout,
    Member,
    ModelFacts,
    Outcome,
    Plan,
    Request,
    Shape,
    StepsEnded,
    WorkerUp,
)
from control.scheduler.workflow import NodeKind

from .driving import FLUX, FLUX_CSV, World, case

PROFILE = Profile.from_csv(FLUX_CSV)
SIZES = tuple(Shape(width=px, height=px) for px in (256, 512, 1024, 1536))
CALLS = st.tuples(st.sampled_from(SIZES), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]))


def lease(name: str, **changes: object) -> WorkerUp:
    facts = {"at_us": 0, "incarnation": "1", "gpu": "h100", "host": "h0", "models": (FLUX,)}
    return WorkerUp(worker=name, **{**facts, **changes})


def plain(cluster: Cluster, model: str, degree: int) -> list[str]:
    """`Cluster.able`, worked out anew."""
    workers = sorted(cluster.workers.values(), key=lambda w: (w.host, w.island, w.name))
    return [w.name for w in workers if w.usable and w.can(model, degree)]


def assignment(sequence: int, *requests: str, worker: str = "w0", steps: int = 1) -> Assignment:
    return Assignment(
        sequence=sequence,
        node=DIT,
        batch=tuple(Member(request=r, first_step=0, attempt=0, holders=()) for r in requests),
        steps=steps,
        workers=(worker,),
        epoch=0,
        layout=Layout(),
        step_time_us=10,
        step_time_us_safe=10,
        start_us=0,
        end_us=10,
        reason="",
    )


# ------------------------------------------------------------------------------------ the cluster


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 7)), max_size=20))
def test_answers_about_workers_follow_every_change(changes):
    cluster = Cluster(0)
    other = ModelFacts(name="other", degrees=(1, 2))
    for name, what in changes:
        worker = cluster.workers.get(name)
        if worker is None or what <= 2:
            news = {"models": (FLUX, other)[: 1 + what % 2], "gpu": "ab"[what % 2]}
            worker = cluster.lease(lease(name, host=f"h{what}", **news))
        elif what == 3 and worker.state is not WorkerState.LOST:
            worker.move(WorkerState.LOST)
        elif what == 4 and worker.state is WorkerState.UP:
            worker.move(WorkerState.SUSPECT)
        elif what in (5, 6):
            worker.drain(what == 5)
        elif what == 7:
            cluster.forget_lost(set())
        for model in (FLUX.name, "other"):
            for degree in (1, 2, 8):
                names = plain(cluster, model, degree)
                assert list(cluster.able_names(model, degree)) == names
                assert [w.name for w in cluster.able(model, degree)] == names
            widths = [d for d in (1, 2, 4, 8) if len(plain(cluster, model, d)) >= d]
            assert list(cluster.degrees(model)) == widths
        living = tuple(w.name for w in cluster.usable())
        kinds = {cluster.workers[n].gpu for n in living or cluster.workers}
        assert cluster.gpus(living) == (tuple(sorted(kinds)) or ("",))
        assert cluster.canonical(reversed(living)) == living


def test_a_heartbeat_without_news_keeps_what_is_known():
    cluster = Cluster(0)
    cluster.lease(lease("a"))
    version, usable = cluster.version, cluster.usable()
    cluster.lease(lease("a", at_us=7, incarnation="2", memory_mib=5))
    assert cluster.version == version and cluster.usable() is usable


def test_groups_are_known_by_size_in_the_order_they_came_up():
    cluster = Cluster(0)
    for name in "abcd":
        cluster.lease(lease(name))
    groups = [("a", "b"), ("c",), ("b", "c"), ("c", "d"), ("a", "b")]
    for group in groups:
        cluster.epoch(group)
    assert cluster.warm_groups(2) == [("a", "b"), ("b", "c"), ("c", "d")]
    cluster.workers["b"].move(WorkerState.LOST)
    cluster.forget_lost(set())
    assert cluster.warm_groups(2) == [("c", "d")] and cluster.warm_groups(3) == []


# ------------------------------------------------------------------------------------ predictions


@given(st.lists(st.tuples(CALLS, st.sampled_from([0.5, 0.9, 1.0, 1.1, 3.0])), max_size=40))
def test_kept_predictions_are_those_of_a_model_that_keeps_none(measured):
    kept = LatencyModel(PROFILE, Settings())
    calls = [("flux.1-dev", s, DIT, d, ("h100",), b) for s in SIZES for d in (1, 8) for b in (1, 2)]
    for (shape, degree, batch), ratio in measured:
        key = CellKey("flux.1-dev", "h100", DIT, shape, Layout(ulysses=degree), batch)
        kept.observe(key, round(100_000 * ratio))
        fresh = LatencyModel(PROFILE, Settings())
        fresh.restore(kept.snapshot())
        assert [kept.predict_call(c) for c in calls] == [fresh.predict_call(c) for c in calls]


def test_a_measurement_that_changes_nothing_takes_nothing_back():
    model = LatencyModel(PROFILE, Settings())
    key = CellKey("flux.1-dev", "h100", DIT, SIZES[0], Layout(), 1)
    step_us = model.predict(key).mean_us
    other = model.predict(key._replace(batch=64))  # borrows
    for _ in range(40):
        model.observe(key, step_us)
    version = model.version
    model.observe(key, step_us)
    assert model.version == version
    for _ in range(40):
        model.observe(key, 2 * step_us)
    assert model.version > version and model.predict(key).mean_us == 2 * step_us
    assert model.predict(key._replace(batch=64)).mean_us == pytest.approx(
        2 * other.mean_us, rel=0.01
    )


def test_rates_follow_losses_and_measurements():
    settings = Settings()
    ledger = Ledger(
        settings,
        LatencyModel(PROFILE, settings),
        Cluster(0),
        Moving(settings),
        Residency(LoadTable({})),
    )
    for name in "abcd":
        ledger.cluster.lease(lease(name))
    request = Request(id="r", model="flux.1-dev", shape=SIZES[2], steps=4)
    before = ledger.rates(request)
    assert before.degrees == (1, 2, 4) and ledger.rates(request) is before
    ledger.cluster.workers["a"].drain(True)
    assert ledger.rates(request).degrees == (1, 2)
    key = CellKey("flux.1-dev", "h100", DIT, SIZES[2], Layout(), 1)
    for _ in range(9):
        ledger.latency.observe(key, 2 * before.mean_us[1])
    assert ledger.rates(request).mean_us[1] == 2 * before.mean_us[1]
    assert ledger.predict_usable(request, DIT, 1, 1).mean_us == 2 * before.mean_us[1]


# ------------------------------------------------------------------------------------ the books


def test_called_off_work_is_forgotten_with_the_last_of_its_requests():
    board = Board()
    for sequence, requests in ((1, ("a",)), (2, ("a", "b")), (3, ("b",))):
        board.add(Flight(assignment(sequence, *requests), 0, NodeKind.STEPPED))
        board.call_off(sequence)
    board.forget("a")
    assert list(board.retired) == [2, 3], "the other one may still hear of its step"
    board.forget("b")
    assert not board.retired and not board._retired_of


def test_what_changed_stays_bounded_where_nobody_asks():
    world = World(workers=1, policy="fixed-1")
    ledger = world.scheduler._ledger
    ledger.touched.update(dict.fromkeys(map(str, range(TOUCHED_MAX))))
    world.arrive("inside")
    world.arrive("gone")
    world.observe(CancelRequested(at_us=0, request="gone"))
    for i in range(3):
        world.arrive(f"more{i}")
        world.observe(CancelRequested(at_us=0, request=f"more{i}"))
    assert len(ledger.touched) < TOUCHED_MAX and "inside" in ledger.touched


def test_estimates_are_those_of_who_looks_at_everything_anew():
    world = World(workers=3, policy="fixed-1")
    scheduler = world.scheduler
    probe = Request(id="new", model="flux.1-dev", shape=SIZES[0], steps=9, deadline_us=2_000_000)

    def check() -> None:
        ledger, now_us = scheduler._ledger, world.now_us
        known = [scheduler.predict_finish_us(probe, now_us)]
        known += [scheduler.eta_us(r, now_us) for r in ledger.tracked]
        progressed = ledger.progressed
        assert progressed == {}
        fresh = Estimates(ledger, scheduler._planner)
        anew = fresh.newcomers_finish_us((probe,), now_us)
        assert known == anew + [fresh.finish_us(t, now_us) for t in ledger.tracked.values()]
        ledger.progressed = progressed  # the scheduler's own estimates go on reading

    for i in range(30):
        world.arrive(f"r{i}", px=(256, 1024)[i % 2], slo_us=10**6 * (1 + i % 4), priority=i % 2)
        check()
        world.plan()
        for a in scheduler.outstanding()[i % 3 :]:
            steps = 1 + i % max(1, a.steps)
            last = steps == a.steps
            world.step(a, steps, last=last, step_us=a.step_time_us * (1 + (i > 20)))
            check()
        if i % 7 == 3:
            world.observe(CancelRequested(at_us=world.now_us, request=f"r{i - 1}"))
        if i == 12:
            world.lose("w1")
        if i == 18:
            world.up("w1", incarnation="2", latents={"r5": 3, "r8": 28})
        check()


def test_what_progressed_stays_bounded_where_nobody_asks():
    world = World(workers=1, policy="fixed-1")
    world.arrive("asks")
    world.scheduler.eta_us("asks", 0)
    for i in range(PROGRESSED_MAX):
        world.arrive(f"r{i}")
    assert len(world.scheduler._ledger.progressed) == PROGRESSED_MAX
    world.arrive("one more")
    assert world.scheduler._ledger.progressed is None


# ------------------------------------------------------------------------------------ the log


def test_a_run_begins_with_its_load():
    log = ScheduleLog(0)
    log.observed(lease("w0"))
    request = Request(id="r", model="flux.1-dev", shape=SIZES[0], steps=1)
    log.observed(Arrived(at_us=0, request=request))
    log.planned(Plan(round=1, now_us=0, start_us=0, assignments=(assignment(1, "r"),)))
    fact = StepsEnded(
        at_us=1_000,
        sequence=1,
        jobs=(JobProgress(request="r", attempt=0, steps_done=1),),
        step_time_us=(100,),
        last=True,
        group_time_us=1,
        transfer_time_us=20,
        load_time_us=300,
    )
    log.observed(fact)
    (line,) = [x for x in log.lines() if isinstance(x, RunLine)]
    assert (line.start_us, line.end_us) == (1_000 - 100 - 321, 1_000)


# ------------------------------------------------------------------------------------ few workers


def test_no_degree_is_no_reason_to_fail():
    assert at_most((), 8) == 1 and at_most((1, 2), 8) == 2 and at_most((2, 4), 1) == 2
    assert fastest({}) == 1


@pytest.mark.parametrize("kind", ["lost", "drain"])
@pytest.mark.parametrize("at_us", [1, 1_500_000])
@pytest.mark.parametrize("policy", ["fixed-4", "fixed-8", "rssp", "rasp", "edf", "sjf", "srtf"])
def test_whoever_is_left_finishes(policy, at_us, kind):
    rows = [(i * 70_000, (256, 512, 1024, 2048)[i % 4], 3_000_000) for i in range(12)]
    for gone in (5, 7):
        faults = tuple(
            FaultSpec(at_us=at_us + i * 1_000, kind=kind, worker=f"w{i:04}") for i in range(gone)
        )
        for lead_us in (0, 5_000):
            result = run(case(rows, workers=8, faults=faults, policy=policy, lead_us=lead_us))
            assert [e.outcome for e in result.ended] == [Outcome.DONE] * 12


@pytest.mark.parametrize("policy", ["fixed-8", "rssp", "rasp", "edf", "sjf", "srtf"])
def test_without_workers_requests_wait_until_some_come_back(policy):
    rows = [(0, 512, 3_000_000), (600_000, 1024, 3_000_000)]
    drains = [FaultSpec(at_us=300_000, kind="drain", worker=f"w{i:04}") for i in range(2)]
    lost = [FaultSpec(at_us=500_000, kind="lost", worker=f"w{i:04}") for i in range(2)]
    back = [FaultSpec(at_us=900_000, kind=kind, worker="w0000") for kind in ("up", "undrain")]
    result = run(case(rows, workers=2, faults=(*drains, *lost, *back), policy=policy))
    assert [e.outcome for e in result.ended] == [Outcome.DONE] * 2


def test_holders_of_the_latest_latent_stand_by_name():
    tracked = Tracked(Request(id="r", model="m", shape=SIZES[0], steps=2), 0, 0, 0)
    assert tracked.latest() == ()
    tracked.holders = {"b": 0, "a": 0, "c": 1}
    assert [h.worker for h in tracked.latest()] == ["a", "b"]
