"""A request's life at control, as a table: what may follow what, and who says so.

The scheduler has tables for jobs and workers (control/scheduler/books/lifecycle.py); this is the
one above them. Every change of a record's state goes through `Records`, which goes through this
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from control.scheduler.books.lifecycle import moved
from hocket.v1.generation_pb2 import GenerationState


class LifecycleState(Enum):
    """Where a request stands."""

    RECEIVED = "received"  # holds a place at the door; nothing is promised
    PROMISED = "promised"  # in the promises stream; no work on it has begun under this leader
    RUNNING = "running"  # an assignment of it was sent
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # never promised, and not remembered


REQUEST_MOVES: Mapping[LifecycleState, frozenset[LifecycleState]] = {
    LifecycleState.RECEIVED: frozenset({LifecycleState.PROMISED, LifecycleState.REFUSED}),
    # A new leader may find that a promised request has ended; nobody else finishes it unseen.
    LifecycleState.PROMISED: frozenset(
        {
            LifecycleState.RUNNING,
            LifecycleState.FINISHED,
            LifecycleState.FAILED,
            LifecycleState.CANCELLED,
        }
    ),
    LifecycleState.RUNNING: frozenset(
        {LifecycleState.FINISHED, LifecycleState.FAILED, LifecycleState.CANCELLED}
    ),
    LifecycleState.FINISHED: frozenset(),
    LifecycleState.FAILED: frozenset(),
    LifecycleState.CANCELLED: frozenset(),
    LifecycleState.REFUSED: frozenset(),
}

OPEN = frozenset({LifecycleState.PROMISED, LifecycleState.RUNNING})
ENDED = frozenset({LifecycleState.FINISHED, LifecycleState.FAILED, LifecycleState.CANCELLED})

_TOLD: Mapping[LifecycleState, GenerationState.ValueType] = {
    LifecycleState.PROMISED: GenerationState.GENERATION_STATE_PROMISED,
    LifecycleState.RUNNING: GenerationState.GENERATION_STATE_RUNNING,
    LifecycleState.FINISHED: GenerationState.GENERATION_STATE_FINISHED,
    LifecycleState.FAILED: GenerationState.GENERATION_STATE_FAILED,
    LifecycleState.CANCELLED: GenerationState.GENERATION_STATE_CANCELLED,
}


def advanced(request: str, state: LifecycleState, target: LifecycleState) -> LifecycleState:
    """The new state. Raises IllegalMove where the table has no such move."""
    return moved(f"request {request}", state, target, REQUEST_MOVES)


def told(state: LifecycleState) -> GenerationState.ValueType:
    """What clients call the state; unspecified where they never see it."""
    return _TOLD.get(state, GenerationState.GENERATION_STATE_UNSPECIFIED)


def diagram() -> str:
    """The table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> received"]
    for state, targets in REQUEST_MOVES.items():
        names = sorted(t.value for t in targets) or ["[*]"]
        lines += [f"    {state.value} --> {name}" for name in names]
    return "\n".join(lines) + "\n"
