"""What a driver may look at: frozen pictures of requests and workers."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from .books.ledger import Ledger
from .books.lifecycle import JobState, WorkerState
from .books.tracker import Tracked
from .values import Holder
from .workflow import ArtifactType


class RequestState(StrEnum):
    """What a client would call it."""

    QUEUED = "queued"
    ENCODING = "encoding"
    WAITING = "waiting"  # for its next steps (parked where its holders are)
    DENOISING = "denoising"
    DECODING = "decoding"


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """One request inside the scheduler."""

    request: str
    state: RequestState
    nodes: dict[str, str]  # node -> JobState value
    calls: tuple[str, ...]  # of these, those under way or, where there are none, next
    steps: int  # of all passes
    steps_done: int
    attempt: int
    group: tuple[str, ...]  # ran its last step
    holders: tuple[Holder, ...]  # all copies, furthest first
    outstanding: tuple[int, ...]  # sequences
    degree_changes: int
    moves: int
    steps_lost: int


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, in cluster order."""

    name: str
    host: str
    gpu: str
    incarnation: str
    state: str  # WorkerState value
    draining: bool
    usable: bool  # gets new assignments
    models: tuple[str, ...]
    outstanding: tuple[int, ...]  # sequences in its order
    latents: int  # copies it holds


def job_view(tracked: Tracked) -> JobView:
    """The picture of one request."""
    holders = (Holder(worker=w, steps_done=n) for w, n in tracked.holders.items())
    return JobView(
        request=tracked.id,
        state=_state(tracked),
        nodes={node: job.state.value for node, job in tracked.jobs.items()},
        calls=_calls(tracked),
        steps=tracked.steps_total,
        steps_done=tracked.steps_over,
        attempt=tracked.attempt,
        group=tracked.group,
        holders=tuple(sorted(holders, key=lambda h: (-h.steps_done, h.worker))),
        outstanding=tuple(tracked.outstanding),
        degree_changes=tracked.degree_changes,
        moves=tracked.moves,
        steps_lost=tracked.steps_lost,
    )


def worker_views(ledger: Ledger) -> tuple[WorkerView, ...]:
    """The pictures of all workers."""
    flights = ledger.board.flights.values()
    return tuple(
        WorkerView(
            name=w.name,
            host=w.host,
            gpu=w.gpu,
            incarnation=w.incarnation,
            state=w.state.value,
            draining=w.draining,
            usable=w.usable,
            models=tuple(sorted(w.models)),
            outstanding=tuple(
                f.assignment.sequence for f in flights if w.name in f.assignment.workers
            ),
            latents=sum(w.name in m for t in ledger.tracked.values() for m in t.marks.values()),
        )
        for w in ledger.cluster.ordered()
    )


def _calls(tracked: Tracked) -> tuple[str, ...]:
    jobs = tracked.jobs.values()
    under_way = tuple([job.node for job in jobs if job.state is JobState.ASSIGNED])
    return under_way or tuple([job.node for job in jobs if job.state is JobState.READY])


def _state(tracked: Tracked) -> RequestState:
    if tracked.workflow.at > 0 and (calls := [j for j in tracked.before if j.outstanding]):
        nodes = [tracked.workflow.node[job.node] for job in calls]
        made = {artifact.type for node in nodes for artifact in node.outputs}
        encodes = made & {ArtifactType.EMBEDDINGS, ArtifactType.LATENTS}
        return RequestState.ENCODING if encodes else RequestState.DECODING
    dit = tracked.stepped.state
    if dit is JobState.DONE and any(job.state is not JobState.BLOCKED for job in tracked.after):
        return RequestState.DECODING
    if any(job.state is JobState.ASSIGNED for job in tracked.before):
        return RequestState.ENCODING
    if dit is JobState.ASSIGNED:
        return RequestState.DENOISING
    if dit is JobState.READY:
        return RequestState.WAITING
    return RequestState.QUEUED


__all__ = ["JobView", "RequestState", "WorkerState", "WorkerView", "job_view", "worker_views"]
