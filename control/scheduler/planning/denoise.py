"""From the ledger to a policy's candidates, and from its choices to bound groups.

The state is looked at where the window begins: a job stands behind its outstanding assignment, a
worker is free when the board's forecast says so. Whether a job is taken into a window at all
depends on its kind (`rounds.WindowKind`): an amendment sees waiting jobs and idle workers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..books.board import BoardForecast
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Tracked
from ..outlook.placement import Demand, Placement
from ..outlook.rounds import Window, WindowKind
from ..outlook.standing import Standing, standing
from ..policies.base import Candidate, Choice, Policy, steps_in
from ..resilience import elsewhere
from ..values import Request


@dataclass(frozen=True, slots=True)
class Bound:
    """A choice with its workers and steps."""

    tracked: Tracked
    standing: Standing
    choice: Choice
    workers: tuple[str, ...]
    steps: int
    start_us: int


def plannable(
    ledger: Ledger, window: Window, forecast: BoardForecast, now_us: int
) -> dict[str, Standing]:
    """The denoise jobs that this window may decide on, in order of arrival."""
    found: dict[str, Standing] = {}
    for tracked in ledger.tracked.values():
        where = standing(ledger, tracked, forecast, now_us)
        if where is None or where.first_step >= tracked.request.steps:
            continue
        waits = tracked.stepped.state is JobState.READY
        encoding = tracked.stepped.state is JobState.BLOCKED
        if window.kind is WindowKind.AMENDMENT and not waits:
            continue
        limit_us = window.start_us + 1 if encoding else window.end_us
        if waits or where.available_us < limit_us:
            found[tracked.id] = where
    return found


def workers_of(
    ledger: Ledger, window: Window, forecast: BoardForecast, now_us: int
) -> dict[str, int]:
    """The workers that this window may bind, and when each is free."""
    idle_only = window.kind is WindowKind.AMENDMENT
    return {
        w.name: forecast.free_us[w.name]
        for w in ledger.cluster.denoisers()
        if forecast.free_us[w.name] < (now_us + 1 if idle_only else window.end_us)
    }


def degrees_of(ledger: Ledger, request: Request) -> tuple[int, ...]:
    """Widths in which a request's denoiser can run on the usable workers, ascending."""
    return ledger.degrees(request)


def fastest_us(ledger: Ledger, request: Request) -> int:
    """Its shortest step, whatever the width."""
    return min(ledger.rates(request).width_us.values())


def candidate(
    ledger: Ledger, tracked: Tracked, where: Standing, open_: Mapping[str, int]
) -> Candidate | None:
    """The job as policies see it; None when no open worker has its model.

    Degrees and times are those of all usable workers: what is open only limits what fits.
    """
    request = tracked.request
    if open_.keys().isdisjoint(ledger.cluster.able_names(request.model)):
        return None
    rates = ledger.rates(request)
    degrees = elsewhere.degrees(ledger, tracked.id, rates.degrees)
    return Candidate(
        request=request.id,
        order=tracked.order,
        priority=request.priority,
        deadline_us=ledger.denoise_deadline_us(request),
        available_us=where.available_us,
        waiting_since_us=tracked.progressed_us,
        steps_left=request.steps - where.first_step,
        degrees=degrees,
        mean_us=rates.mean_us,
        safe_us=rates.safe_us,
        group=where.group,
        holders=tuple(h.worker for h in where.holders),
    )


def decide(
    ledger: Ledger, policy: Policy, window: Window, forecast: BoardForecast, now_us: int
) -> list[Bound]:
    """Asks the policy for widths and binds them; in the order in which they go out."""
    open_ = workers_of(ledger, window, forecast, now_us)
    stand = plannable(ledger, window, forecast, now_us)
    found = (candidate(ledger, ledger.tracked[r], where, open_) for r, where in stand.items())
    candidates = {c.request: c for c in found if c is not None}
    if not candidates:
        return []
    chosen = policy.choose(window, tuple(candidates.values()), len(open_))
    assert sum(c.degree for c in chosen) <= len(open_), "a policy overcommitted"
    placement = Placement(ledger.cluster, open_)
    bound: list[Bound] = []
    for choice in sorted(chosen, key=lambda c: _binding_rank(c, candidates[c.request])):
        c = candidates[choice.request]
        one = _bind(ledger, placement, window, choice, c, stand[c.request])
        if one is not None:
            bound.append(one)
    if window.kind is WindowKind.EVENT:  # what cannot start now has only reserved its workers
        bound = [b for b in bound if b.start_us <= now_us + ledger.settings.lead_us]
    return bound


def _binding_rank(choice: Choice, c: Candidate) -> tuple[bool, int, int]:
    """Those who can keep their group bind first, then wide before narrow."""
    return (choice.degree != len(c.group), -choice.degree, c.order)


def _bind(
    ledger: Ledger,
    placement: Placement,
    window: Window,
    choice: Choice,
    c: Candidate,
    where: Standing,
) -> Bound | None:
    tracked = ledger.tracked[c.request]
    step_us = c.mean_us[choice.degree]
    ready_us = max(where.available_us, window.start_us)
    demand = Demand(choice.degree, step_us, ready_us, c.group, c.holders)
    workers = ledger.cluster.workers
    able = [n for n in workers if workers[n].can(tracked.request.model, choice.degree)]
    able = list(elsewhere.open_to(ledger, tracked.id, able, choice.degree))
    members = placement.find(demand, able)
    if members is None:
        return None
    start_us = max(where.available_us, placement.free_us(members))
    straddle = ledger.settings.straddle
    steps = steps_in(
        window.end_us - max(start_us, window.start_us), step_us, straddle, choice.steps
    )
    steps = max(steps, choice.steps_min)
    if steps == 0:
        return None
    placement.bind(members)
    return Bound(tracked, where, choice, members, steps, start_us)
