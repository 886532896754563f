"""What a live run says of call times, and how it is set beside the simulator."""

from __future__ import annotations

import csv
import io

import pytest

from bench.live_command import compare
from bench.live_profile import live_profile
from bench.live_run import Outcome
from bench.sim.case import Case, ClusterSpec
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from control.scheduler.profile import Profile
from control.scheduler.schedule_log import DoneLine
from hocket import spans
from hocket.span_file import SpanRecord

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
    found = times(live_profile(CSV, [*first, *later], {"r": asked("a")}))
    assert found["dit", 1] == pytest.approx((2 * 12_000 + 10 * 15_000) / 12, rel=1e-3)
    assert found["dit", 2] == pytest.approx(6000 * found["dit", 1] / 10_000, rel=1e-3)
    assert found["text", 1] == 1000 and found["vae", 1] == 5000


def test_too_few_steps_and_others_requests_say_nothing() -> None:
    few = [step("r", i, i * 15, 12, "w0") for i in range(4)]
    warm = [step("warm", i, i * 90, 80, "w0") for i in range(9)]
    found = live_profile(CSV, [*few, *warm], {"r": asked("a")})
    assert times(found) == times(CSV)


def test_what_is_written_is_a_profile() -> None:
    steps = [step("r", i, i * 15, 12, "w0") for i in range(9)]
    read = Profile.from_csv(live_profile(CSV, steps, {"r": asked("a")}))
    assert len(read.cells) == 4


def planned() -> Case:
    profile = Profile.from_csv(CSV)
    return Case(
        cluster=ClusterSpec(workers=2).completed(profile),
        profile_csv=CSV,
        trace=tuple(asked(f"r{i}", i * 20_000) for i in range(6)),
    )


def as_simulated(case: Case) -> dict[str, Outcome]:
    lines = run(case).log.lines()
    finish_us = {x.request: x.finish_us for x in lines if isinstance(x, DoneLine)}
    return {
        t.id: Outcome(finish_us[t.id] - t.arrival_us, finish_us[t.id] - t.arrival_us <= t.slo_us)
        for t in case.trace
    }


def test_a_live_run_like_the_simulated_one_differs_in_nothing() -> None:
    case = planned()
    same = compare("p", 0, case, as_simulated(case))
    assert same.error_p90 == 0 and same.points == 0 and same.problems == 0


def test_what_differs_is_seen() -> None:
    case = planned()
    live = as_simulated(case)
    for request, outcome in live.items():
        assert outcome.latency_us is not None
        live[request] = Outcome(round(1.5 * outcome.latency_us), False)
    live["r0"] = Outcome(None, False, problem="refused")
    found = compare("p", 0, case, live)
    assert found.error_p50 == pytest.approx(0.5, rel=1e-3) == found.bias_p50
    assert found.points < 0 and found.problems == 1 and found.requests == 6
