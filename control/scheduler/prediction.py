"""When will it be done? An estimate for clients, not for plans.

A fluid picture: the GPU time of everything more urgent is shared out over all workers, then the
request itself runs at the degree that its policy likely gives it. Mean times; encode and decode
included.
"""

from __future__ import annotations

from .ledger import Ledger
from .lifecycle import JobState
from .policies import Policy
from .tracker import Tracked
from .values import DIT, TEXT, VAE, Request


def newcomer_finish_us(ledger: Ledger, policy: Policy, request: Request, now_us: int) -> int:
    """Finish of a request that arrived now."""
    ahead = _ahead(ledger, request, ledger.arrivals)
    own_us = _stage_us(ledger, request, TEXT) + request.steps * _step_us(ledger, policy, request)
    own_us += _stage_us(ledger, request, VAE)
    return now_us + _queue_us(ledger, ahead) + own_us


def finish_us(ledger: Ledger, policy: Policy, tracked: Tracked, now_us: int) -> int:
    """Finish of a request inside."""
    request = tracked.request
    ahead = _ahead(ledger, request, tracked.order)
    text, dit, vae = (tracked.jobs[n].state for n in (TEXT, DIT, VAE))
    forecast = ledger.board.forecast(ledger.cluster, now_us)
    ready_us = max([now_us, *(forecast.end_us[s] for s in tracked.outstanding)])
    if vae is JobState.ASSIGNED:
        return ready_us
    covered = sum(ledger.board.flights[s].steps_left for s in tracked.jobs[DIT].outstanding)
    left = max(0, request.steps - tracked.steps_done - covered)
    own_us = left * _step_us(ledger, policy, request) + _stage_us(ledger, request, VAE)
    if text in (JobState.READY, JobState.BLOCKED):
        own_us += _stage_us(ledger, request, TEXT)
    queue_us = 0 if dit is JobState.DONE or left == 0 else _queue_us(ledger, ahead)
    return max(ready_us, now_us + queue_us) + own_us


def _urgency(request: Request, order: int) -> tuple[int, bool, int, int]:
    return (-request.priority, request.deadline_us is None, request.deadline_us or 0, order)


def _ahead(ledger: Ledger, request: Request, order: int) -> list[Tracked]:
    """Whoever is served before: higher priority, earlier deadline, earlier arrival."""
    mine = _urgency(request, order)
    others = ledger.tracked.values()
    return [t for t in others if t.id != request.id and _urgency(t.request, t.order) < mine]


def _queue_us(ledger: Ledger, ahead: list[Tracked]) -> int:
    workers = max(1, len(ledger.cluster.usable()))
    work_us = 0
    for tracked in ahead:
        left = tracked.request.steps - tracked.steps_done
        gpus = ledger.gpus(())
        work_us += left * ledger.predict(tracked.request, DIT, 1, gpus).mean_us
        work_us += _stage_us(ledger, tracked.request, VAE)
    return work_us // workers


def _stage_us(ledger: Ledger, request: Request, node: str) -> int:
    return ledger.predict(request, node, 1, ledger.gpus(())).mean_us


def _step_us(ledger: Ledger, policy: Policy, request: Request) -> int:
    able = [w for w in ledger.cluster.usable() if w.can(request.model)]
    degrees = {1} | {d for w in able for d in w.models[request.model].degrees if d <= len(able)}
    gpus = ledger.gpus(w.name for w in able)
    times = {d: ledger.predict(request, DIT, d, gpus).mean_us for d in sorted(degrees)}
    return times[policy.likely_degree(times)]
