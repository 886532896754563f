"""A scheduler under load for simulated days: does what it holds, or what a plan costs, grow?

Workers are lost and come back all along, requests are cancelled; every simulated hour the objects
that the scheduler reaches are counted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

from control.scheduler.schedule_log import ScheduleLog
from control.scheduler.settings import Settings
from control.scheduler.summary import percentile
from control.scheduler.times.profile import Profile

from .case import ASSETS, Case, ClusterSpec, FaultSpec
from .loop import Loop, Result, Timer
from .workloads import generate

PROFILE = "flux.1-dev_h100_h28.csv"
HOUR_US = 3_600_000_000
SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
CANCEL_EVERY = 50  # requests


@dataclass(frozen=True, slots=True)
class Hour:
    """What one simulated hour left."""

    number: int
    ended: int
    attainment: float  # of those that ended in it
    inside: int  # requests open at its end
    objects: int  # that the scheduler holds then
    plan_p50_ms: float
    plan_p99_ms: float


def held(root: object) -> int:
    """Objects that the root reaches: code, types and modules apart."""
    seen = {id(root)}
    waiting = [root]
    while waiting:
        for item in gc.get_referents(waiting.pop()):
            if id(item) not in seen and not isinstance(item, SHARED):
                seen.add(id(item))
                waiting.append(item)
    return len(seen)


def soak_case(hours: int, rate: float, workers: int, settings: Settings, seed: int) -> Case:
    """FLUX.1-dev's four sizes, `rate` a minute; every ten minutes a worker is away for five."""
    count = int(hours * 60 * rate)
    trace = generate("tetriserve-uniform", seed, {"rate": rate, "slo_scale": 1.2, "count": count})
    faults = []
    for number, at_us in enumerate(range(0, hours * HOUR_US, HOUR_US // 6)):
        worker = f"w{number % workers:04d}"
        faults.append(FaultSpec(at_us=at_us + 60_000_000, kind="lost", worker=worker))
        faults.append(FaultSpec(at_us=at_us + 360_000_000, kind="up", worker=worker))
    faults += [
        FaultSpec(at_us=t.arrival_us + 2_000_000, kind="cancel", request=t.id)
        for t in trace[::CANCEL_EVERY]
    ]
    profile_csv = (ASSETS / "profiles" / PROFILE).read_text()
    spec = ClusterSpec(workers=workers).completed(Profile.from_csv(profile_csv))
    return Case(
        cluster=spec, profile_csv=profile_csv, trace=trace, settings=settings, faults=tuple(faults)
    )


def soak(case: Case, timer: Timer, hour_us: int = HOUR_US) -> Iterator[Hour]:
    """Runs a Case to its end, hour by hour. Raises: InvariantError."""
    loop = Loop(case, timer=timer, keep=False)
    number = 0
    goes_on = True
    while goes_on:
        number += 1
        loop.result = Result(ScheduleLog(loop.now_us))  # what was logged before is dropped
        while goes_on and loop.now_us < number * hour_us:
            goes_on = loop.instant()
        result = loop.result
        plan_ms = sorted(result.plan_ms) or [0.0]
        yield Hour(
            number=number,
            ended=len(result.ended),
            attainment=sum(e.on_time for e in result.ended) / max(1, len(result.ended)),
            inside=len({j.request for j in loop.scheduler.jobs()}),
            objects=held(loop.scheduler),
            plan_p50_ms=percentile(plan_ms, 50),
            plan_p99_ms=percentile(plan_ms, 99),
        )
