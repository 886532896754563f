"""Nodes that are called once (encode, decode): one call on one worker, assigned at any event, round
or not.

They are short and at the two ends of a deadline, so they do not wait for boundaries: an idle worker
takes them at once (decode: one that holds the latent, if it can), otherwise the one that is free
first. A burst is not bound all at once: a worker is given a few ahead, the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..books.cluster import Worker
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Job, Tracked
from ..outlook.standing import standing_for
from ..resilience import elsewhere
from ..workflow import NodeKind


@dataclass(frozen=True, slots=True)
class StageChoice:
    """A worker for a job that is called once."""

    tracked: Tracked
    job: Job
    worker: str


def waiting(ledger: Ledger) -> list[tuple[Tracked, Job]]:
    """Ready jobs that are called once: by priority, then earlier deadline, then earlier arrival."""
    ready = [
        (tracked, job)
        for tracked in ledger.tracked.values()
        for jobs in (tracked.before, tracked.after)
        for job in jobs
        if job.state is JobState.READY
    ]
    return sorted(ready, key=lambda pair: _urgency(pair[0]))


class Room:
    """What workers can still be given in one plan: at most `stages_ahead` such jobs at a time.

    The rest waits here, where a more urgent job or a lost worker still changes its place.
    """

    def __init__(self, ledger: Ledger, free_us: dict[str, int], now_us: int) -> None:
        """`free_us` is the forecast's, and follows what the caller issues."""
        self._ledger = ledger
        self._free_us = free_us
        self._now_us = now_us
        self._ahead: dict[str, int] = {}
        for flight in ledger.board.flights.values():
            if flight.kind is NodeKind.ONCE:
                for name in flight.assignment.workers:
                    self._ahead[name] = self._ahead.get(name, 0) + 1
        limit = ledger.settings.stages_ahead
        self._usable = ledger.cluster.usable()
        self._open = [w for w in self._usable if self._ahead.get(w.name, 0) < limit]
        self._able: dict[tuple[str, str], list[Worker]] = {}  # by model and operation: open ones
        self.short = False  # some job waits for room, and for nothing else

    def choose(self, tracked: Tracked, job: Job) -> StageChoice | None:
        """The worker for one such job; None while no usable worker can run it, or has room."""
        model, op = self._ledger.call(tracked.request, job.node)[:2]
        if (model, op) not in self._able:
            self._able[model, op] = [w for w in self._open if w.can(model, 1, op)]
        able = self._able[model, op]
        out = elsewhere.barred(self._ledger, tracked.id)
        if out:
            able = [w for w in able if w.name not in out]
        if not able:
            self.short = self.short or any(w.can(model, 1, op) for w in self._usable)
            return None
        holders = {h.worker for h in standing_for(self._ledger, tracked, job.node)[1]}

        def preference(worker: Worker) -> tuple[int, bool, bool]:
            free_us = max(self._now_us, self._free_us[worker.name])
            return free_us, worker.name not in holders, not worker.suspected

        chosen = min(able, key=preference)
        self._take(chosen)
        return StageChoice(tracked, job, chosen.name)

    def _take(self, worker: Worker) -> None:
        self._ahead[worker.name] = self._ahead.get(worker.name, 0) + 1
        if self._ahead[worker.name] >= self._ledger.settings.stages_ahead:
            self._open.remove(worker)
            self._able.clear()


def _urgency(tracked: Tracked) -> tuple[int, bool, int, int]:
    request = tracked.request
    return (
        -request.priority,
        request.deadline_us is None,
        request.deadline_us or 0,
        tracked.order,
    )
