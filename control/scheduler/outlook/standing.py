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
from ..values import Holder, Input
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
        holders = _behind(ledger, tracked)[1]
        return Standing(tracked.steps_done, now_us, holders, tracked.group)
    if stepped.state is JobState.BLOCKED and tracked.preparing and not tracked.prepared:
        ends = [j.outstanding[-1] for j in tracked.before if j.state is JobState.ASSIGNED]
        available_us = max([forecast.end_us[sequence] for sequence in ends])
        plain = tracked.workflow.plain
        holders = _makers(ledger, 0, ends) if plain else _behind(ledger, tracked)[1]
        return Standing(0, available_us, holders, ())
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
    if node == workflow.stepped or (workflow.plain and node in workflow.on_latents):
        return _behind(ledger, tracked)
    if not workflow.makers[node]:
        return 0, ()
    done = 0 if workflow.section[node] is Section.BEFORE else tracked.request.steps
    holders = [w for one in inputs_of(ledger, tracked, node) for w in one.holders]
    return done, tuple([Holder(worker=w, steps_done=done) for w in dict.fromkeys(holders)])


def inputs_of(ledger: Ledger, tracked: Tracked, node: str) -> tuple[Input, ...]:
    """What a job's next assignment takes, artifact by artifact, behind what is outstanding; not of
    a plain chain.
    """
    workflow = tracked.workflow
    if node == workflow.stepped:
        done, holders = _behind(ledger, tracked)
        if done:
            own = workflow.node[node].outputs[0].name
            names = tuple([h.worker for h in holders])
            return (Input(artifact=own, version=done, holders=names),)
    return tuple([_input(ledger, tracked, name) for name in workflow.node[node].inputs])


def _input(ledger: Ledger, tracked: Tracked, artifact: str) -> Input:
    maker = tracked.workflow.maker[artifact]
    version = tracked.steps_of(maker) if maker in tracked.marks else 0
    holders = tracked.where(artifact)
    if not holders and (out := tracked.jobs[maker].outstanding):  # those who will have it
        holders = ledger.board.flights[out[-1]].assignment.workers
    return Input(artifact=artifact, version=version, holders=holders)


def _behind(ledger: Ledger, tracked: Tracked) -> tuple[int, tuple[Holder, ...]]:
    """Steps done and holders of the latents, or of what they begin from, behind what is
    outstanding.
    """
    workflow, stepped = tracked.workflow, tracked.stepped
    if stepped.outstanding:
        done = ledger.steps_behind(tracked)
        group = group_before(ledger, tracked)
        return done, tuple(Holder(worker=w, steps_done=done) for w in group)
    if not workflow.plain:
        if tracked.steps_done:
            return tracked.steps_done, tracked.latest()
        names = workflow.node[stepped.node].inputs
        known = [w for name in names for w in _input(ledger, tracked, name).holders]
        return 0, tuple([Holder(worker=w, steps_done=0) for w in dict.fromkeys(known)])
    if stepped.state is JobState.BLOCKED:  # else the report of what was before it is late
        out = [s for job in tracked.before for s in job.outstanding]
        if out:
            return 0, _makers(ledger, 0, out)
    return tracked.steps_done, tracked.latest()


def next_node(ledger: Ledger, tracked: Tracked) -> str:
    """The node that a request's next assignment is of, behind what is outstanding: one that is
    ready, where some are. Behind the steps of a pass that is not the last nothing is given before
    their end is told: the last node stands for it.
    """
    stepped = tracked.stepped
    if not tracked.preparing:
        return _next_of(tracked.before).node
    steps = tracked.request.steps
    if stepped.state is not JobState.DONE and _behind(ledger, tracked)[0] < steps:
        return stepped.node
    if tracked.ending or not tracked.workflow.ending:
        return tracked.last.node
    return _next_of(tracked.after).node


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
    if group or tracked.workflow.plain:
        return group or tuple(h.worker for h in _behind(ledger, tracked)[1])
    return tuple(h.worker for h in standing_for(ledger, tracked, next_node(ledger, tracked))[1])
