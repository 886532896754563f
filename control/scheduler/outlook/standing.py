"""Where a request stands behind what is outstanding: node, first step, latent, group.

What a policy plans is the next assignment, and an assignment under way is as good as done: its last
step is the next one's first, its workers hold the latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..books.board import BoardForecast
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Job, Tracked
from ..values import Holder
from ..workflow import Section


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a stepped job stands once its outstanding assignments are over."""

    first_step: int
    available_us: int
    holders: tuple[Holder, ...]
    group: tuple[str, ...]


def standing(
    ledger: Ledger, tracked: Tracked, forecast: BoardForecast, now_us: int
) -> Standing | None:
    """None while the job cannot be planned: something before it is not under way, or a next
    assignment of it is already out.
    """
    stepped = tracked.stepped
    if stepped.state is JobState.READY:
        return Standing(tracked.steps_done, now_us, tracked.latest(), tracked.group)
    if stepped.state is JobState.BLOCKED and tracked.preparing and not tracked.prepared:
        ends = [j.outstanding[-1] for j in tracked.before if j.state is JobState.ASSIGNED]
        available_us = max([forecast.end_us[sequence] for sequence in ends])
        return Standing(0, available_us, _makers(ledger, 0, ends), ())
    if stepped.state is not JobState.ASSIGNED or len(stepped.outstanding) != 1:
        return None
    sequence = stepped.outstanding[0]
    assignment = ledger.board.flights[sequence].assignment
    member = next(m for m in assignment.batch if m.request == tracked.id)
    done = member.first_step + assignment.steps
    holders = tuple(Holder(worker=w, steps_done=done) for w in assignment.workers)
    return Standing(done, forecast.end_us[sequence], holders, assignment.workers)


def standing_for(ledger: Ledger, tracked: Tracked, node: str) -> tuple[int, tuple[Holder, ...]]:
    """First step, and holders of what it takes, of a job's next assignment, behind what is
    outstanding.
    """
    workflow = tracked.workflow
    if not workflow.makers[node]:
        return 0, ()
    if node not in workflow.on_latents:
        done = 0 if workflow.section[node] is Section.BEFORE else tracked.request.steps
        makers = [tracked.jobs[maker] for maker in workflow.makers[node]]
        out = [s for job in makers for s in job.outstanding]
        known = [Holder(worker=w, steps_done=done) for w in tracked.inputs(node)]
        return done, _once_each((*known, *_makers(ledger, done, out)))
    return _behind(ledger, tracked)


def _behind(ledger: Ledger, tracked: Tracked) -> tuple[int, tuple[Holder, ...]]:
    """Steps done and holders of the latents, behind what is outstanding."""
    workflow, stepped = tracked.workflow, tracked.stepped
    if stepped.outstanding:
        assignment = ledger.board.flights[stepped.outstanding[-1]].assignment
        member = next(m for m in assignment.batch if m.request == tracked.id)
        done = member.first_step + assignment.steps
        return done, tuple(Holder(worker=w, steps_done=done) for w in assignment.workers)
    known: list[Holder] = []
    if not tracked.steps_done and len(workflow.makers[stepped.node]) > 1:
        known = [Holder(worker=w, steps_done=0) for w in tracked.inputs(stepped.node)]
    if stepped.state is JobState.BLOCKED:  # else the report of what was before it is late
        out = [s for job in tracked.before for s in job.outstanding]
        if out:
            return 0, _once_each((*known, *_makers(ledger, 0, out)))
    return tracked.steps_done, tracked.latest() or tuple(known)


def _once_each(holders: tuple[Holder, ...]) -> tuple[Holder, ...]:
    """Without repetition: one worker may have several of a node's inputs."""
    return holders if len(holders) < 2 else tuple(dict.fromkeys(holders))


def next_node(ledger: Ledger, tracked: Tracked) -> str:
    """The node that a request's next assignment is of, behind what is outstanding: one that is
    ready, where some are.
    """
    stepped = tracked.stepped
    if not tracked.preparing:
        return _next_of(tracked.before).node
    steps = tracked.request.steps
    if stepped.state is not JobState.DONE and _behind(ledger, tracked)[0] < steps:
        return stepped.node
    return tracked.last.node if tracked.ending else _next_of(tracked.after).node


def _next_of(jobs: Sequence[Job]) -> Job:
    """A ready one, or else the first that nobody was given."""
    for job in jobs:
        if job.state is JobState.READY:
            return job
    return next(job for job in jobs if job.state is JobState.BLOCKED)


def _makers(ledger: Ledger, steps_done: int, sequences: Iterable[int]) -> tuple[Holder, ...]:
    """Those who make, in these assignments, what is to be taken."""
    workers = [w for s in sequences for w in ledger.board.flights[s].assignment.workers]
    return tuple([Holder(worker=w, steps_done=steps_done) for w in dict.fromkeys(workers)])


def group_before(ledger: Ledger, tracked: Tracked) -> tuple[str, ...]:
    """The group that runs, or ran, the job's denoising steps before its next assignment."""
    outstanding = tracked.stepped.outstanding
    if not outstanding:
        return tracked.group
    return ledger.board.flights[outstanding[-1]].assignment.workers


def workers_before(ledger: Ledger, tracked: Tracked) -> tuple[str, ...]:
    """From where its next assignment goes on: that group, or else who has, or makes, its latent."""
    group = group_before(ledger, tracked)
    return group or tuple(h.worker for h in _behind(ledger, tracked)[1])
