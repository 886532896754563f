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


class RequestState(Enum):
    """Where a request stands."""

    RECEIVED = "received"  # holds a place at the door; nothing is promised
    PROMISED = "promised"  # in the promises stream; no work on it has begun under this leader
    RUNNING = "running"  # an assignment of it was sent
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # never promised, and not remembered


REQUEST_MOVES: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.RECEIVED: frozenset({RequestState.PROMISED, RequestState.REFUSED}),
    # A new leader may find that a promised request has ended; nobody else finishes it unseen.
    RequestState.PROMISED: frozenset(
        {
            RequestState.RUNNING,
            RequestState.FINISHED,
            RequestState.FAILED,
            RequestState.CANCELLED,
        }
    ),
    RequestState.RUNNING: frozenset(
        {RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED}
    ),
    RequestState.FINISHED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.CANCELLED: frozenset(),
    RequestState.REFUSED: frozenset(),
}

OPEN = frozenset({RequestState.PROMISED, RequestState.RUNNING})
ENDED = frozenset({RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED})

_TOLD: Mapping[RequestState, GenerationState.ValueType] = {
    RequestState.PROMISED: GenerationState.GENERATION_STATE_PROMISED,
    RequestState.RUNNING: GenerationState.GENERATION_STATE_RUNNING,
    RequestState.FINISHED: GenerationState.GENERATION_STATE_FINISHED,
    RequestState.FAILED: GenerationState.GENERATION_STATE_FAILED,
    RequestState.CANCELLED: GenerationState.GENERATION_STATE_CANCELLED,
}


def advanced(request: str, state: RequestState, target: RequestState) -> RequestState:
    """The new state. Raises IllegalMove where the table has no such move."""
    return moved(f"request {request}", state, target, REQUEST_MOVES)


def told(state: RequestState) -> GenerationState.ValueType:
    """What clients call the state; unspecified where they never see it."""
    return _TOLD.get(state, GenerationState.GENERATION_STATE_UNSPECIFIED)


def diagram() -> str:
    """The table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> received"]
    for state, targets in REQUEST_MOVES.items():
        names = sorted(t.value for t in targets) or ["[*]"]
        lines += [f"    {state.value} --> {name}" for name in names]
    return "\n".join(lines) + "\n"
