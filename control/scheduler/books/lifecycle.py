"""What may follow what: the lifecycles of jobs and workers as tables.

A state is an Enum member, a legal move an entry of a dict; every change of state in this library
goes through `moved`, and an illegal one raises. The tables are all there is: the docs are drawn
from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar


class JobState(Enum):
    """Where one job (one node of one request) stands."""

    BLOCKED = "blocked"  # a job before it has to end first
    READY = "ready"  # waits for workers
    ASSIGNED = "assigned"  # at least one assignment of it is outstanding
    DONE = "done"
    DROPPED = "dropped"  # its request ended without it


class WorkerState(Enum):
    """What the scheduler believes of a worker. Draining is a wish, not a belief: see `Worker`."""

    UP = "up"
    SUSPECT = "suspect"  # a peer accused it: gets nothing until its lease is seen again
    LOST = "lost"  # its lease ended; what it held is gone


JOB_MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.BLOCKED: frozenset({JobState.READY, JobState.ASSIGNED, JobState.DROPPED}),
    JobState.READY: frozenset({JobState.ASSIGNED, JobState.BLOCKED, JobState.DROPPED}),
    JobState.ASSIGNED: frozenset(
        {JobState.READY, JobState.DONE, JobState.BLOCKED, JobState.DROPPED}
    ),
    # A finished job runs again when the latent that it made is lost.
    JobState.DONE: frozenset({JobState.READY, JobState.BLOCKED}),
    JobState.DROPPED: frozenset(),
}

WORKER_MOVES: Mapping[WorkerState, frozenset[WorkerState]] = {
    WorkerState.UP: frozenset({WorkerState.SUSPECT, WorkerState.LOST}),
    WorkerState.SUSPECT: frozenset({WorkerState.UP, WorkerState.LOST}),
    WorkerState.LOST: frozenset({WorkerState.UP}),
}

S = TypeVar("S", bound=Enum)


class IllegalMove(Exception):
    """A lifecycle was about to make a move that its table lacks: a bug of ours."""

    def __init__(self, subject: str, state: Enum, target: Enum) -> None:
        super().__init__(f"{subject}: no move from {state.value} to {target.value}")
        self.subject = subject
        self.state = state
        self.target = target


def moved(subject: str, state: S, target: S, table: Mapping[S, frozenset[S]]) -> S:
    """The new state, if the table has that move. Staying where one is needs no entry.

    Raises:
        IllegalMove: the table has no such move.
    """
    if target is not state and target not in table[state]:
        raise IllegalMove(subject, state, target)
    return target
