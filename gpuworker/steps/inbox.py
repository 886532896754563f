"""A worker's assignments, in the leader's order, and the truncations that concern them.

Filled by the agent's thread, emptied by whatever runs the steps. Assignments are handed out
strictly by sequence number, which is the same order on every worker: that is why two groups never
wait for each other. A truncation is only *read* here; where a group really stops is settled by its
first member (see engine.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from hocket.v1 import mesh_pb2

_WAITING_MAX = 4096  # assignments; control finds out that more have not arrived
_STOP_MARKS_MAX = 4096  # requests whose truncations are remembered; the oldest are forgotten first


@dataclass(frozen=True)
class StopMark:
    """Attempts up to `attempt` of a request stop after `stop_at_step` steps; 0 means as soon as
    they can.
    """

    attempt: int
    stop_at_step: int


class Inbox:
    """Thread-safe. Refuses assignments of older terms, and repeated ones."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[mesh_pb2.Assignment] = []
        self._marks: dict[str, StopMark] = {}
        self._closed = False
        self._pending: set[tuple[int, int]] = set()  # (term, sequence) received and not over
        self.term = 0
        self.sequence = 0  # highest one received in this term
        self.refused = 0  # messages of an older term, and assignments beyond what can wait

    def accept_term(self, term: int) -> bool:
        """False for a message of an older term; a newer term forgets what the older one had
        planned.
        """
        with self._changed:
            if term < self.term:
                self.refused += 1
                return False
            if term > self.term:
                self.term, self.sequence = term, 0
                self._waiting.clear()
                self._marks.clear()
                self._pending.clear()
            return True

    def put(self, assignment: mesh_pb2.Assignment) -> None:
        with self._changed:
            if assignment.sequence <= self.sequence:
                return  # delivered twice
            if len(self._waiting) >= _WAITING_MAX:
                self.refused += 1
                return
            self.sequence = assignment.sequence
            self._waiting.append(assignment)
            self._pending.add((self.term, assignment.sequence))
            self._changed.notify_all()

    def done(self, assignment: mesh_pb2.Assignment) -> None:
        """The assignment is over, well or not."""
        with self._changed:
            self._pending.discard((assignment.term, assignment.sequence))

    def pending(self) -> tuple[int, ...]:
        """Sequence numbers of the current term that were received and are not over."""
        with self._changed:
            return tuple(sorted(seq for term, seq in self._pending if term == self.term))

    def truncate(self, request: str, mark: StopMark) -> None:
        with self._changed:
            known = self._marks.pop(request, None)
            newest = mark if known is None or mark.attempt >= known.attempt else known
            self._marks[request] = newest
            while len(self._marks) > _STOP_MARKS_MAX:
                del self._marks[next(iter(self._marks))]
            self._changed.notify_all()

    def take(self) -> mesh_pb2.Assignment | None:
        """Blocks until there is an assignment; None once the inbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.pop(0)

    def take_ready(self) -> mesh_pb2.Assignment | None:
        """The next assignment, or None where there is none at present."""
        with self._changed:
            return self._waiting.pop(0) if self._waiting and not self._closed else None

    def staying(self, assignment: mesh_pb2.Assignment, made: int = 0) -> tuple[str, ...]:
        """The jobs that go on after `made` steps of an assignment, by request.

        A new leader plans from the latents that exist: what the old one had under way stops.
        """
        with self._changed:
            if assignment.term < self.term:
                return ()
            marks = [(m, self._marks.get(m.request_id)) for m in assignment.batch]
        return tuple(
            member.request_id
            for member, mark in marks
            if mark is None
            or member.attempt > mark.attempt
            or member.first_step + made < mark.stop_at_step
        )

    def must_stop(self, assignment: mesh_pb2.Assignment, made: int = 0) -> bool:
        """Whether none of its jobs goes on after `made` steps of an assignment."""
        return not self.staying(assignment, made)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
