"""Encode and decode: one call on one worker, assigned at any event, round or not.

They are short and at the two ends of a deadline, so they do not wait for boundaries: an idle worker
takes them at once (decode: one that holds the latent, if it can), otherwise the one that is free
first.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Worker
from .ledger import Ledger
from .lifecycle import JobState
from .tracker import Job, Tracked
from .values import TEXT, VAE


@dataclass(frozen=True, slots=True)
class StageChoice:
    """A worker for an encode or decode job."""

    tracked: Tracked
    job: Job
    worker: str


def waiting(ledger: Ledger) -> list[tuple[Tracked, Job]]:
    """Ready encode and decode jobs: by priority, then earlier deadline, then earlier arrival."""
    ready = [
        (tracked, tracked.jobs[node])
        for tracked in ledger.tracked.values()
        for node in (TEXT, VAE)
        if tracked.jobs[node].state is JobState.READY
    ]
    return sorted(ready, key=lambda pair: _urgency(pair[0]))


def choose_worker(
    ledger: Ledger, tracked: Tracked, job: Job, free_us: dict[str, int], now_us: int
) -> StageChoice | None:
    """The worker for one such job; None while no usable worker has the model."""
    able = [w for w in ledger.cluster.usable() if w.can(tracked.request.model)]
    if not able:
        return None
    holders = {h.worker for h in tracked.latest()} if job.node == VAE else set()

    def preference(worker: Worker) -> tuple[int, bool]:
        return max(now_us, free_us[worker.name]), worker.name not in holders

    return StageChoice(tracked, job, min(able, key=preference).name)


def _urgency(tracked: Tracked) -> tuple[int, bool, int, int]:
    request = tracked.request
    return (
        -request.priority,
        request.deadline_us is None,
        request.deadline_us or 0,
        tracked.order,
    )
