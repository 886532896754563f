"""The summary of a run (DESIGN.md section 10): one JSON object, from a schedule log's lines."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .schedule_log import DoneLine, HeaderLine, Line, RejectedLine, RunLine, ScheduleLog
from .values import Arrived, Request


class LatencySummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arrival to finish of the requests that were done."""

    p50: float
    p90: float
    p99: float


class PlanTimeSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Wall time of a call of `plan`."""

    p50: float
    p99: float


class ClassSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of one model and shape."""

    requests: int
    met: int
    attainment: float


class PromiseSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of requests with a deadline that were told their finish when they arrived."""

    told: int
    promised: int  # told "on time"
    kept: int  # and were
    firm_promised: int
    firm_kept: int


class Summary(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Fractions are 0..1; what was rejected, cancelled or failed is a miss."""

    requests: int
    met: int
    attainment: float
    by_class: dict[str, ClassSummary]
    latency_s: LatencySummary
    gpu_seconds_used: float
    utilisation: float
    rejected: int
    preemptions: int  # pauses of a denoise job longer than one of its steps
    degree_changes: int
    plan_ms: PlanTimeSummary
    promises: PromiseSummary | None = None  # where anybody was told anything


def summarise(log: ScheduleLog, plan_ms: Sequence[float] = ()) -> Summary:
    """Sums a log up. `plan_ms`: wall time of each call of `plan`, where it was measured."""
    lines = log.lines()
    finish_us = {x.request: x.finish_us for x in lines if isinstance(x, DoneLine)}
    runs = [x for x in lines if type(x) is RunLine]
    classes: dict[str, list[bool]] = {}
    latency_s: list[float] = []
    promises: list[tuple[Arrived, bool]] = []
    origin_us = log.start_us
    for request_id, arrived in log.arrivals.items():
        request = arrived.request
        met = False
        if request_id in finish_us:
            finished_us = finish_us[request_id] + origin_us
            latency_s.append((finished_us - arrived.at_us) / 1e6)
            met = request.deadline_us is None or finished_us <= request.deadline_us
        classes.setdefault(_class(request), []).append(met)
        if arrived.promised_us is not None and request.deadline_us is not None:
            promises.append((arrived, met))
    rejected = sum(isinstance(x, RejectedLine) for x in lines)
    refused = [x.request for x in lines if isinstance(x, RejectedLine)]
    total = len(log.arrivals) + sum(r not in log.arrivals for r in refused)
    met_in_all = sum(sum(c) for c in classes.values())
    stepped = [r for r in runs if log.steps(r.node, r.requests[0])]
    preemptions, degree_changes = _interruptions(stepped)
    busy_us = sum((r.end_us - r.start_us) * len(r.gpus) for r in runs)
    latency_s.sort()
    return Summary(
        requests=total,
        met=met_in_all,
        attainment=met_in_all / total if total else 0.0,
        by_class={k: _class_summary(v) for k, v in sorted(classes.items())},
        latency_s=LatencySummary(**{f"p{q}": percentile(latency_s, q) for q in (50, 90, 99)}),
        gpu_seconds_used=busy_us / 1e6,
        utilisation=_utilisation(log, lines, busy_us),
        rejected=rejected,
        preemptions=preemptions,
        degree_changes=degree_changes,
        plan_ms=PlanTimeSummary(**{f"p{q}": percentile(sorted(plan_ms), q) for q in (50, 99)}),
        promises=_promise_summary(promises),
    )


def _promise_summary(told: Sequence[tuple[Arrived, bool]]) -> PromiseSummary | None:
    if not told:
        return None
    promised = [(a.request.firm, met) for a, met in told if a.on_time]
    return PromiseSummary(
        told=len(told),
        promised=len(promised),
        kept=sum(met for _, met in promised),
        firm_promised=sum(firm for firm, _ in promised),
        firm_kept=sum(firm and met for firm, met in promised),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks of an ascending sequence; 0 when empty."""
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _class(request: Request) -> str:
    shape = request.shape
    return f"{request.model} {shape.width}x{shape.height}x{shape.frames}"


def _class_summary(met: Sequence[bool]) -> ClassSummary:
    return ClassSummary(requests=len(met), met=sum(met), attainment=sum(met) / len(met))


def _interruptions(runs: Sequence[RunLine]) -> tuple[int, int]:
    preemptions = degree_changes = 0
    before: dict[tuple[str, str], RunLine] = {}
    for run in sorted(runs, key=lambda r: r.start_us):
        for request in run.requests:
            last = before.get((request, run.node))
            if last is not None:
                step_us = (last.end_us - last.start_us) / last.steps
                preemptions += run.start_us - last.end_us > step_us
                degree_changes += len(run.gpus) != len(last.gpus)
            before[request, run.node] = run
    return preemptions, degree_changes


def _utilisation(log: ScheduleLog, lines: Sequence[Line], busy_us: int) -> float:
    """Busy time over workers x (first arrival to last end)."""
    header = lines[0]
    assert isinstance(header, HeaderLine)
    ends = [x.end_us for x in lines if isinstance(x, RunLine)]
    ends += [x.finish_us for x in lines if isinstance(x, DoneLine)]
    if not ends or not log.arrivals:
        return 0.0
    begin_us = min(a.at_us for a in log.arrivals.values()) - log.start_us
    return busy_us / (max(1, max(ends) - begin_us) * len(header.workers))
