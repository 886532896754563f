"""Calls that a request's pod does not offer, on workers of other pods.

A pod is made of workers alike that step, and a request is where its steps are. Another worker may
be all that encodes its prompt, or that needs no weights to write its file. Such calls are single
and short, so they start before the pods are planned, the most urgent first, on whoever is free.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...books.ledger import Ledger
from ...books.lifecycle import JobState
from ...books.tracker import Job, Tracked
from ...outlook.standing import standing_for
from ...resilience import elsewhere
from ...starts import Issue, Start
from ...workflow import NodeKind
from .pods import Pod, Pods
from .roster import RosterMaker

REASON = "stage"


def start(ledger: Ledger, pods: Pods, maker: RosterMaker, now_us: int, issue: Issue) -> None:
    """Starts what can start now."""
    inside: Iterable[str] = ledger.tracked if ledger.cluster.partial else ledger.named
    waiting = [
        (ledger.tracked[request], job)
        for request in inside
        for job in _calls(ledger, pods.where.get(request), ledger.tracked[request])
    ]
    free: dict[int, dict[str, int]] = {}
    for tracked, job in sorted(waiting, key=lambda pair: _urgency(pair[0])):
        able: dict[str, Pod] = {}
        for pod in pods.pods:
            if ledger.can(pod.workers[0], tracked.request, job.node):
                if pod.index not in free:
                    free[pod.index] = maker.free(ledger, pod, now_us)
                able.update(dict.fromkeys(free[pod.index], pod))
        worker = _choose(ledger, tracked, job, able)
        if worker is None:
            continue
        pod = able[worker]
        begin_us = max(now_us, free[pod.index].pop(worker))
        issued = issue(Start((tracked.id,), job.node, (worker,), 1, REASON), begin_us)
        pod.sequences.setdefault(worker, []).append(issued.sequence)
        pods.guests.setdefault(issued.sequence, []).append(pod.index)


def _calls(ledger: Ledger, pod: Pod | None, tracked: Tracked) -> list[Job]:
    """Those that are ready, and not for its own pod."""
    return [
        job
        for job in (*tracked.before, *tracked.after)
        if job.state is JobState.READY
        and tracked.workflow.node[job.node].kind is NodeKind.ONCE
        and not (pod is not None and ledger.can(pod.workers[0], tracked.request, job.node))
    ]


def _choose(ledger: Ledger, tracked: Tracked, job: Job, able: Iterable[str]) -> str | None:
    """Of the free ones: where the weights are, then where the inputs are."""
    out = elsewhere.barred(ledger, tracked.id)
    held = {h.worker for h in standing_for(ledger, tracked, job.node)[1]}
    workers = ledger.cluster.workers

    def place(name: str) -> tuple[int, bool, bool]:
        load_us = ledger.load_us(workers[name], tracked.request, job.node)
        return load_us, name not in held, not workers[name].suspected

    return min((name for name in able if name not in out), key=place, default=None)


def _urgency(tracked: Tracked) -> tuple[int, bool, int, int]:
    request = tracked.asked
    return (
        -request.priority,
        request.deadline_us is None,
        request.deadline_us or 0,
        tracked.order,
    )
