"""What a live run says of call times, and how it is set beside the simulator."""

from __future__ import annotations

import csv
import io

import msgspec
import pytest

from bench.live.compare import compare
from bench.live.profile import live_profile
from bench.live.run import RequestOutcome
from bench.sim.call_times import Contention
from bench.sim.case import Case, CaseError, ClusterSpec
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from control.scheduler.schedule_log import DoneLine
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from hocket.tracing import spans
from hocket.tracing.span_file import SpanRecord

CSV = """model,gpu,node,width,height,frames,degree,batch,call_us,source
m,cpu,text,64,64,1,1,1,1000,x
m,cpu,dit,64,64,1,1,1,10000,x
m,cpu,dit,64,64,1,2,1,6000,x
m,cpu,vae,64,64,1,1,1,5000,x
"""
MS = 1_000_000


def asked(name: str, arrival_us: int = 0) -> TraceRequest:
    return TraceRequest(
        id=name,
        arrival_us=arrival_us,
        model="m",
        workflow="txt2img",
        width=64,
        height=64,
        frames=1,
        steps=10,
        slo_us=200_000,
        priority=0,
    )


def step(request: str, number: int, start_ms: float, took_ms: float, *workers: str) -> SpanRecord:
    return SpanRecord(
        trace_id="t",
        span_id=f"{request}{number}",
        parent_id="",
        name=spans.STEP,
        start_unix_ns=round(start_ms * MS),
        end_unix_ns=round((start_ms + took_ms) * MS),
        service="gpuworker",
        instance=workers[0],
        attributes={
            spans.REQUEST: request,
            spans.NODE: "dit",
            spans.DEGREE: len(workers),
            spans.WORKERS: list(workers),
            spans.SEQUENCE: number,
        },
    )


def times(text: str) -> dict[tuple[str, int], int]:
    rows = csv.DictReader(io.StringIO(text))
    return {(r["node"], int(r["degree"])): int(r["call_us"]) for r in rows}


def test_a_step_takes_its_gap_with_it_and_unseen_cells_move_along() -> None:
    """Steps of 12 ms, 3 ms apart, but for a pause of a second; two workers were never measured."""
    first = [step("r", i, i * 15, 12, "w0") for i in range(6)]
    later = [step("r", 6 + i, 1000 + i * 15, 12, "w0") for i in range(6)]
    found = times(live_profile(CSV, [*first, *later], {"r": asked("a")})[0])
    assert found["dit", 1] == pytest.approx((2 * 12_000 + 10 * 15_000) / 12, rel=1e-3)
    assert found["dit", 2] == pytest.approx(6000 * found["dit", 1] / 10_000, rel=1e-3)
    assert found["text", 1] == 1000 and found["vae", 1] == 5000


def test_too_few_steps_and_others_requests_say_nothing() -> None:
    few = [step("r", i, i * 15, 12, "w0") for i in range(4)]
    warm = [step("warm", i, i * 90, 80, "w0") for i in range(9)]
    found, _ = live_profile(CSV, [*few, *warm], {"r": asked("a")})
    assert times(found) == times(CSV)


def test_what_is_written_is_a_profile() -> None:
    steps = [step("r", i, i * 15, 12, "w0") for i in range(9)]
    read = Profile.from_csv(live_profile(CSV, steps, {"r": asked("a")})[0])
    assert len(read.cells) == 4


def test_a_step_is_beside_others_where_another_worker_computes_in_its_middle() -> None:
    """Steps of 10 ms alone, of 16 ms while w1 steps for somebody whom nobody asked about."""
    alone = [step("r", i, i * 10, 10, "w0") for i in range(20)]
    beside = [step("r", 20 + i, 200 + i * 16, 16, "w0") for i in range(20)]
    other = [step("warm", i, 201 + i * 16, 14, "w1") for i in range(20)]
    whole, contention = live_profile(CSV, [*alone, *beside, *other], {"r": asked("a")})
    assert times(whole)["dit", 1] == 13_000
    assert times(contention.alone_csv)["dit", 1] == 10_000
    assert times(contention.beside_csv)["dit", 1] == 16_000
    assert times(contention.alone_csv)["dit", 2] == 6000  # scaled by what was measured


def test_nineteen_steps_beside_others_say_nothing_of_being_beside() -> None:
    alone = [step("r", i, i * 10, 10, "w0") for i in range(20)]
    beside = [step("r", 20 + i, 200 + i * 16, 16, "w0") for i in range(19)]
    other = [step("warm", i, 201 + i * 16, 14, "w1") for i in range(19)]
    whole, contention = live_profile(CSV, [*alone, *beside, *other], {"r": asked("a")})
    assert times(contention.beside_csv)["dit", 1] == times(whole)["dit", 1] > 12_000


def test_a_group_steps_beside_none_of_its_own() -> None:
    group = [step("r", i, i * 10, 10, "w0", "w1") for i in range(20)]
    _, contention = live_profile(CSV, group, {"r": asked("a")})
    assert times(contention.alone_csv)["dit", 2] == 10_000


def test_simulated_workers_slow_each_other_down() -> None:
    """Two equal requests on two workers: 10 steps of 16 ms beside each other; one: of 10 ms."""
    steps = [step("r", i, i * 10, 10, "w0") for i in range(20)]
    steps += [step("r", 20 + i, 200 + i * 16, 16, "w0") for i in range(20)]
    steps += [step("warm", i, 201 + i * 16, 14, "w1") for i in range(20)]
    text, contention = live_profile(CSV, steps, {"r": asked("a")})
    settings = Settings(policy="fixed-1")
    base = msgspec.structs.replace(planned(), profile_csv=text, settings=settings)
    one = msgspec.structs.replace(base, trace=base.trace[:1], contention=contention)
    two = msgspec.structs.replace(one, trace=(asked("a"), asked("b")))
    assert latencies(one) == {"r0": 1000 + 10 * 10_000 + 5000}
    assert latencies(two) == {"a": 160_000, "b": 166_000}  # a's first step begins just before b's
    assert latencies(msgspec.structs.replace(two, contention=None))["a"] == 1000 + 130_000 + 5000


def test_only_workers_of_one_host_can_share_its_cores() -> None:
    cluster = ClusterSpec(workers=2, hosts=2).completed(Profile.from_csv(CSV))
    contention = Contention(alone_csv=CSV, beside_csv=CSV)
    with pytest.raises(CaseError, match=r"cluster\.hosts = 2"):
        msgspec.structs.replace(planned(), cluster=cluster, contention=contention)


def planned() -> Case:
    profile = Profile.from_csv(CSV)
    return Case(
        cluster=ClusterSpec(workers=2).completed(profile),
        profile_csv=CSV,
        trace=tuple(asked(f"r{i}", i * 20_000) for i in range(6)),
    )


def latencies(case: Case) -> dict[str, int]:
    lines = run(case).log.lines()
    finish_us = {x.request: x.finish_us for x in lines if isinstance(x, DoneLine)}
    return {t.id: finish_us[t.id] - t.arrival_us for t in case.trace}


def as_simulated(case: Case, scale: float = 1.0) -> dict[str, RequestOutcome]:
    took_us = {r: round(scale * us) for r, us in latencies(case).items()}
    return {t.id: RequestOutcome(took_us[t.id], took_us[t.id] <= t.slo_us) for t in case.trace}


def test_a_live_run_like_the_simulated_one_differs_in_nothing() -> None:
    case = planned()
    same = compare("p", 0, [as_simulated(case)] * 2, case, case)
    assert same.simulated == same.own and same.points == 0 and same.problems == 0
    assert same.simulated.error_p90 == same.simulated.one_p50 == same.spread_p50 == 0


def test_what_differs_is_seen() -> None:
    case = planned()
    live = as_simulated(case, 1.5)
    live["r0"] = RequestOutcome(None, False, problem="refused")
    late = {r: RequestOutcome(o.latency_us, on_time=False) for r, o in live.items()}
    found = compare("p", 0, [late], case, case)
    assert found.simulated.error_p50 == pytest.approx(0.5, rel=1e-3)
    assert found.simulated.bias_p50 == found.simulated.one_p50 == found.simulated.error_p50
    assert found.points < 0 and found.problems == 1 and found.requests == 6


def test_of_several_runs_the_median_counts_and_how_far_they_are_apart() -> None:
    """0.8, 1.0 and 1.25 of the simulated: each 20 to 36 % from another, in the median 0 %."""
    case = planned()
    lives = [as_simulated(case, scale) for scale in (0.8, 1.0, 1.25)]
    found = compare("p", 0, lives, case, case)
    assert found.simulated.error_p50 == 0
    assert found.simulated.one_p50 == pytest.approx((0.2 + 0 + 0.25) / 3, rel=1e-3)
    assert found.spread_p50 == pytest.approx((0.2 + 0.36 + 0.2) / 3, rel=1e-2)
    assert len(found.attainments) == 3 and "live against live 25" in found.line
