"""How many workers are wanted: what must hold whatever is asked of a pool."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from control.scaling.hysteresis import PoolScaler, Wanted
from control.scaling.need import Due, PoolDemand
from control.scaling.pools import Outcomes, PoolKey, Pools
from control.scaling.seen_models import MODELS_MAX, ModelsSeen
from control.scaling.settings import ScalingSettings
from control.scaling.signal import WakeSettings
from control.scheduler.core import Scheduler
from control.scheduler.outlook.demand import PoolWork
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import Arrived, ModelFacts, Request, Shape, WorkerUp
from hocket.v1 import control_pb2, generation_pb2, mesh_pb2, types_pb2
from hocket.workflows.catalogue import OPERATIONS
from hocket.workflows.shipped import shipped
from tests.control.stage import running, submit_of

SECOND_US = 1_000_000
DEVICE = mesh_pb2.Device(profile_name="cpu")
PLAIN = ScalingSettings()
EMPTYING = ScalingSettings(to_zero=True)
WORK_US = st.integers(0, 60 * SECOND_US)
DUE = st.builds(Due, st.integers(-60 * SECOND_US, 600 * SECOND_US), WORK_US)
DEMAND = st.builds(
    PoolDemand,
    workers=st.integers(0, 20),
    arrived=st.integers(0, 5),
    arrived_us=WORK_US,
    due=st.lists(DUE, max_size=6),
    decided=st.integers(0, 9),
)


def steps(
    demands: list[PoolDemand], settings: ScalingSettings = PLAIN, scaler: PoolScaler | None = None
) -> list[Wanted]:
    """One a second."""
    scaler = scaler or PoolScaler(settings)
    begin_us = (scaler._at_us or 0) + SECOND_US
    return [scaler.step(d, begin_us + n * SECOND_US) for n, d in enumerate(demands)]


def busy(workers: int, load: float, each_s: float = 10.0) -> PoolDemand:
    """A second of a load that so many workers would be busy with."""
    arrived = load / each_s
    return PoolDemand(workers, arrived=arrived, arrived_us=round(load * SECOND_US))


@settings(max_examples=60, deadline=None)
@given(st.lists(DEMAND, min_size=1, max_size=12), DUE, st.integers(1, 5), WORK_US)
def test_more_work_never_wants_fewer_workers(
    demands: list[PoolDemand], due: Due, more: int, work_us: int
) -> None:
    """More inside, or more that arrives with as much work each."""
    before = steps(demands)[-1].needed
    last = demands[-1]
    assert steps([*demands[:-1], replace(last, due=[*last.due, due])])[-1].needed >= before
    each_us = round(last.arrived_us / last.arrived) if last.arrived else work_us
    grown = replace(last, arrived=last.arrived + more, arrived_us=last.arrived_us + more * each_us)
    alone = PoolScaler(PLAIN)
    assert steps([grown], scaler=alone)[-1].needed >= steps([last])[-1].needed


@settings(max_examples=60, deadline=None)
@given(st.lists(DEMAND, max_size=12), st.integers(0, 6), st.integers(0, 6))
def test_bounds_hold(demands: list[PoolDemand], least: int, beside: int) -> None:
    bounded = replace(EMPTYING, workers_min=least, workers_max=least + beside)
    for wanted in steps(demands, bounded):
        assert least <= wanted.workers <= least + beside


@settings(max_examples=60, deadline=None)
@given(st.lists(DEMAND, min_size=1, max_size=12))
def test_out_at_once_in_after_the_quiet_time(demands: list[PoolDemand]) -> None:
    scaler = PoolScaler(replace(PLAIN, quiet_us=30 * SECOND_US))
    told = steps(demands, scaler=scaler)
    assert all(wanted.workers >= wanted.needed - 0.01 for wanted in told)
    highest = told[-1].workers
    calm = steps([PoolDemand(0)] * 29, scaler=scaler)
    assert all(wanted.workers >= min(highest, told[-1].needed) for wanted in calm)


def test_a_steady_load_wants_its_share_of_time_and_no_more() -> None:
    told = steps([busy(8, 6.0)] * 900)
    assert abs(told[-1].offered - 6.0) < 0.05
    assert told[-1].workers == 8 and told[-1].reason == "load"  # 6 / 0.8


def test_a_rising_load_is_met_when_the_workers_are_there() -> None:
    """One worker's load more each minute: an average of the past would be behind."""
    told = steps([busy(40, n / 60) for n in range(1200)])
    assert 20.0 < told[-1].offered < 21.0


def test_a_queue_is_gone_in_time_and_asked_for_once() -> None:
    """240 s of work, nothing arrives: workers that are asked for share it once they are there."""
    scaler = PoolScaler(PLAIN)
    queue = PoolDemand(1, due=[Due(0, 240 * SECOND_US)], requests=24)
    first, *later = steps([queue] * 50, scaler=scaler)
    assert first.workers == 6 and first.reason == "queue"  # (240 - 60) s within 30 s
    assert max(wanted.workers for wanted in later) == 6


def test_late_requests_want_more_once_in_a_start() -> None:
    late = replace(busy(4, 2.0), decided=4, missed=2)
    told = [wanted.workers for wanted in steps([late] * 200)]
    assert told[30] > 4, "more than the load explains"
    changes = [n for n in range(1, 200) if told[n] != told[n - 1]]
    assert all(b - a >= 60 for a, b in pairwise(changes[2:]))
    calm = steps([busy(4, 2.0)] * 600)
    assert calm[-1].workers < told[-1] and calm[-1].late_share == 0.0


def test_the_last_worker_goes_after_the_idle_time_where_requests_wake_the_model() -> None:
    scaler = PoolScaler(replace(EMPTYING, idle_us=300 * SECOND_US))
    steps([busy(1, 0.5)] * 60, scaler=scaler)
    told = steps([PoolDemand(1)] * 2000, scaler=scaler)
    assert told[298].workers == 1 and told[-1].workers == 0 and told[-1].reason == "idle"
    waking = steps([PoolDemand(0, due=[Due(0, SECOND_US)], requests=1, waiting=1)], scaler=scaler)
    assert waking[-1].workers == 1
    assert steps([PoolDemand(0)] * 2000)[-1].workers == 1, "nobody could wake it"


def test_a_new_leader_holds_what_is_there() -> None:
    assert steps([PoolDemand(7)])[-1].workers == 7
    assert steps([PoolDemand(0)], EMPTYING)[-1].workers == 0


async def test_a_leader_tells_no_number_before_its_workers_were_heard() -> None:
    """And the first number is of all that it was told by then, shown to the scheduler or not."""
    async with running(settle_us=2 * SECOND_US) as stage:
        signal, driver = stage.desk.signal, stage.desk.driver
        stage.own(signal.run())
        await stage.advance(SECOND_US)
        state = await anext(aiter(stage.desk.view.watch()))
        assert state.pools_settling and not state.pools and not signal.readings
        for name in (f"w{n}" for n in range(1, 8)):
            beat = mesh_pb2.Heartbeat(worker=name, incarnation="a", device=DEVICE)
            beat.models.add(name="m", degrees=[1])
            for fact in stage.desk.wiring.leases.heartbeat(beat, driver.stamp()):
                driver.post(fact)
        look = asyncio.ensure_future(signal.look())
        await stage.until(look.done)
        wanted = {(r.key.model, r.demand.workers, r.wanted.workers) for r in signal.readings}
        assert wanted == {("", 8, 8), ("m", 8, 8)}
        await stage.advance(2 * SECOND_US)
        state = await anext(aiter(stage.desk.view.watch()))
        assert not state.pools_settling and {pool.wanted for pool in state.pools} == {8}


def test_a_kind_of_gpu_is_a_pool_of_all_its_models() -> None:
    pools = Pools(PLAIN)
    due = [(0, 120 * SECOND_US)]
    works = {
        ("", "g"): PoolWork(workers=3),
        ("a", "g"): PoolWork(workers=3, due=due, requests=1),
        ("b", "g"): PoolWork(workers=3, due=due, requests=1),
    }
    read = pools.step(works, {"a": Outcomes(4, 0)}, {"gone": ("g",)}, SECOND_US)
    found = {each.key: each for each in read}
    assert set(found) == {PoolKey(m, "g") for m in ("", "a", "b", "gone")}
    whole = found[PoolKey("", "g")]
    assert whole.demand.workers == 3 and whole.demand.work_us == 240 * SECOND_US
    assert (
        whole.demand.decided == 4 and whole.wanted.needed > found[PoolKey("a", "g")].wanted.needed
    )


def test_the_scheduler_tells_work_by_kind_of_gpu() -> None:
    """What is left, split over kinds by their workers; of a model without workers, on the kind
    that served it before.
    """
    scheduler = Scheduler(Settings(policy="edf", default_step_us=100_000), Profile({}))
    shape = Shape(width=64, height=64)
    for name, gpu in (("w0", "small"), ("w1", "small"), ("w2", "large")):
        models = (ModelFacts(name="m"),)
        scheduler.observe(
            WorkerUp(at_us=0, worker=name, incarnation="1", gpu=gpu, host="h", models=models)
        )
    mine = Request(id="r", model="m", shape=shape, steps=4, deadline_us=5 * SECOND_US)
    other = Request(id="s", model="asleep", shape=shape, steps=4)
    for request in (mine, other):
        scheduler.observe(Arrived(at_us=1, request=request))
    works = scheduler.demand([(mine, 2)], {"asleep": ("old",)}, 10, SECOND_US)
    assert works["", "small"].workers == 2 and works["m", "large"].workers == 1
    whole_us = works["asleep", "old"].due[0][1]
    small, large = works["m", "small"], works["m", "large"]
    assert small.due == [(4 * SECOND_US, round(whole_us * 2 / 3))], "rounded down to seconds"
    assert round(small.arrived_us + large.arrived_us) == 2 * whole_us
    assert works["asleep", "old"].waiting == 1 and small.waiting == 0
    assert works["asleep", "old"].due[0][0] == 0


async def test_a_model_without_workers_refuses_unless_requests_may_wake_it() -> None:
    async with running() as stage:
        await stage.beat("w1", models=[generation_pb2.ModelInfo(name="other", degrees=[1])])
        await stage.beat(leaving=True)
        state = await anext(aiter(stage.desk.view.watch()))
        assert [(m.name, m.workers) for m in state.models] == [("other", 1), ("m", 0)]
        answer = asyncio.ensure_future(stage.desk.admission.submit(submit_of("r")))
        await stage.until(answer.done)
        assert answer.result().rejected.reason == "MODEL_NOT_SERVED"


async def test_a_request_wakes_a_model_and_waits_for_so_long() -> None:
    """It is told the finish of a worker that has to start, counts as waiting, and runs when one
    came; another ends at its deadline, a third one after the wait that the operator set.
    """
    wake = WakeSettings(models=True, wait_us=40 * SECOND_US)
    async with running(wake=wake, scaling=EMPTYING) as stage:
        gateway, signal = stage.attach(), stage.desk.signal
        await stage.beat(leaving=True)
        stage.own(signal.run())
        await stage.advance(SECOND_US)
        pool = {status.model: status for status in signal.statuses()}["m"]
        assert (pool.workers, pool.wanted) == (0, 0), "nobody asks"
        soon = types_pb2.Slo(deadline_us=20 * SECOND_US)
        firm = types_pb2.Slo(deadline_us=20 * SECOND_US, on_miss=types_pb2.ON_MISS_REJECT)
        for call, (name, slo) in enumerate((("runs", None), ("late", soon), ("no", firm)), 1):
            stage.submit(gateway, name, call=call, slo=slo)
        await stage.until(lambda: len(gateway.answers) == 3)
        accepted = gateway.answers[1].accepted
        assert accepted.predicted_latency_us > 60 * SECOND_US
        assert not gateway.answers[2].accepted.predicted_on_time
        refusal = gateway.answers[3].rejected
        assert refusal.reason == "DEADLINE_UNATTAINABLE" and refusal.retry_after_us == 0
        await stage.advance(2 * SECOND_US)
        pool = {status.model: status for status in signal.statuses()}["m"]
        assert pool.wanted >= 1 and pool.requests == 2
        await stage.advance(20 * SECOND_US)
        failed = gateway.events("late")[-1].failed
        assert failed.reason == "NO_WORKERS" and "'m' came within 20 s" in failed.message
        await stage.beat(incarnation="b")
        await stage.work()
        assert gateway.kinds("runs")[-1] == "finished"
        await stage.beat(incarnation="b", leaving=True)
        stage.submit(gateway, "waits", call=4)
        await stage.advance(39 * SECOND_US)
        assert not gateway.events("waits")
        await stage.advance(3 * SECOND_US)
        assert gateway.events("waits")[-1].failed.reason == "NO_WORKERS"


async def test_a_second_model_of_a_workflow_is_waited_for_as_the_first() -> None:
    """Its start is in what the request is told; a request ends that waits for it, though it ran."""
    wake = WakeSettings(models=True, wait_us=40 * SECOND_US)
    operations = list(OPERATIONS)
    async with running(wake=wake, scaling=EMPTYING) as stage:
        infos = {
            name: generation_pb2.ModelInfo(
                name=name, degrees=[1], steps_max=100, operations=operations
            )
            for name in ("m", "n")
        }
        await stage.beat("w1", models=[infos["n"]])
        await stage.beat("w1", models=[infos["n"]], leaving=True)
        await stage.beat(models=[infos["m"]])
        stage.own(stage.desk.signal.run())
        submit = submit_of("r", detached=True)
        submit.workflow.CopyFrom(shipped()["two-pass"])
        [_, refine] = [node for node in submit.workflow.nodes if node.op == "denoise"]
        refine.model = "n"
        answer = asyncio.ensure_future(stage.desk.admission.submit(submit))
        await stage.until(answer.done)
        assert answer.result().accepted.predicted_latency_us > PLAIN.start_us
        await stage.work()
        ran = {assignment.node for assignment in stage.assigned()}
        record = stage.desk.records.get("r")
        assert refine.id not in ran and len(ran) >= 2 and record is not None
        await stage.advance(39 * SECOND_US)
        assert record.ended is None
        await stage.advance(4 * SECOND_US)
        assert record.ended is not None and record.ended.failed.reason == "NO_WORKERS"
        assert "'n' came within 40 s" in record.ended.failed.message


def beat(worker: str, *models: str, gpu: str = "g") -> mesh_pb2.Heartbeat:
    infos = [generation_pb2.ModelInfo(name=name) for name in models]
    return mesh_pb2.Heartbeat(worker=worker, models=infos, device=mesh_pb2.Device(profile_name=gpu))


def test_a_model_stays_listed_for_the_retention_and_over_leaders() -> None:
    catalogue = ModelsSeen(kept_us=100)
    catalogue.see([beat("w0", "a", "b"), beat("w1", "b", gpu="h")], 1_000)
    assert [(m.name, m.workers) for m in catalogue.listed()] == [("a", 1), ("b", 2)]
    catalogue.see([beat("w0", "b")], 1_050)
    assert [(m.name, m.workers) for m in catalogue.listed()] == [("b", 1), ("a", 0)]
    assert list(catalogue.asleep()) == ["a"] and catalogue.kinds()["b"] == ("g", "h")
    stored = control_pb2.SeenModels.FromString(catalogue.stored().SerializeToString())
    later = ModelsSeen(kept_us=100)
    later.see([beat("w0", "b")], 1_060)
    later.restore(stored, 1_060)
    assert [(m.name, m.workers) for m in later.listed()] == [("b", 1), ("a", 0)]
    later.see([beat("w0", "b")], 1_101)
    assert [m.name for m in later.listed()] == ["b"]
    later.see([beat("w0", *(f"m{n}" for n in range(MODELS_MAX + 5)))], 1_101)
    assert len(later.listed()) == MODELS_MAX
