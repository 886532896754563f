"""Where a request stands behind what is outstanding: node, first step, latent, group.

What a policy plans is the next assignment, and an assignment under way is as good as done: its last
step is the next one's first, its workers hold the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..books.board import Forecast
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Tracked
from ..values import DIT, TEXT, VAE, Holder


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a denoise job stands once its outstanding assignments are over."""

    first_step: int
    available_us: int
    holders: tuple[Holder, ...]
    group: tuple[str, ...]


def standing(ledger: Ledger, tracked: Tracked, forecast: Forecast, now_us: int) -> Standing | None:
    """None while the job cannot be planned: not encoded, or a next assignment is already out."""
    dit = tracked.jobs[DIT]
    if dit.state is JobState.READY:
        return Standing(tracked.steps_done, now_us, tracked.latest(), tracked.group)
    text = tracked.jobs[TEXT]
    if dit.state is JobState.BLOCKED and text.state is JobState.ASSIGNED:
        sequence = text.outstanding[-1]
    elif dit.state is JobState.ASSIGNED and len(dit.outstanding) == 1:
        sequence = dit.outstanding[0]
    else:
        return None
    assignment = ledger.board.flights[sequence].assignment
    member = next(m for m in assignment.batch if m.request == tracked.id)
    done = member.first_step + (assignment.steps if assignment.node == DIT else 0)
    holders = tuple(Holder(worker=w, steps_done=done) for w in assignment.workers)
    group = assignment.workers if assignment.node == DIT else ()
    return Standing(done, forecast.end_us[sequence], holders, group)


def standing_for(ledger: Ledger, tracked: Tracked, node: str) -> tuple[int, tuple[Holder, ...]]:
    """First step and latent holders of a job's next assignment, behind what is outstanding."""
    if node == TEXT:
        return 0, ()
    text, dit = tracked.jobs[TEXT], tracked.jobs[DIT]
    encoding = text.outstanding if dit.state is JobState.BLOCKED else []  # else its report is late
    outstanding = dit.outstanding or encoding
    if not outstanding:
        return tracked.steps_done, tracked.latest()
    assignment = ledger.board.flights[outstanding[-1]].assignment
    member = next(m for m in assignment.batch if m.request == tracked.id)
    done = member.first_step + (assignment.steps if assignment.node == DIT else 0)
    return done, tuple(Holder(worker=w, steps_done=done) for w in assignment.workers)


def next_node(ledger: Ledger, tracked: Tracked) -> str:
    """The node that a request's next assignment is of, behind what is outstanding."""
    text, dit = tracked.jobs[TEXT], tracked.jobs[DIT]
    if text.state in (JobState.READY, JobState.BLOCKED):
        return TEXT
    if dit.state is JobState.DONE:
        return VAE
    return VAE if standing_for(ledger, tracked, DIT)[0] >= tracked.request.steps else DIT


def group_before(ledger: Ledger, tracked: Tracked) -> tuple[str, ...]:
    """The group that runs, or ran, the job's denoising steps before its next assignment."""
    outstanding = tracked.jobs[DIT].outstanding
    if not outstanding:
        return tracked.group
    return ledger.board.flights[outstanding[-1]].assignment.workers


def workers_before(ledger: Ledger, tracked: Tracked) -> tuple[str, ...]:
    """From where its next assignment goes on: that group, or else who has, or makes, its latent."""
    group = group_before(ledger, tracked)
    return group or tuple(h.worker for h in standing_for(ledger, tracked, DIT)[1])
