"""Finds assignments that got lost between control and a worker, from what heartbeats do not say.

Core NATS delivers at most once: when the broker restarts, an assignment or the report of its end
can vanish, and nobody would wait for it any more. A heartbeat names every assignment that its
worker has received and not yet reported the end of. One that is outstanding here and stays absent
there, heartbeat after heartbeat, is taken for failed; its steps are planned anew from the latest
latent.
"""

from __future__ import annotations

from collections.abc import Sequence

from control.scheduler.failures import MESSAGE_LOST
from control.scheduler.values import Assignment, AssignmentFailed, JobProgress
from hocket.v1 import mesh_pb2

_ABSENT_BEATS = 4  # a message under way is absent from one or two


class LostMessages:
    """Counts, for each outstanding assignment, the heartbeats that did not name it."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._absent: dict[int, int] = {}

    def check(
        self, beat: mesh_pb2.Heartbeat, outstanding: Sequence[Assignment], now_us: int
    ) -> tuple[AssignmentFailed, ...]:
        """The assignments led by the heartbeat's worker that must have been lost."""
        named = set(beat.pending_sequences) if beat.term == self._term else set()
        led = [a for a in outstanding if a.workers[0] == beat.worker]
        lost = []
        for assignment in led:
            here = assignment.sequence in named
            count = 0 if here else self._absent.get(assignment.sequence, 0) + 1
            self._absent[assignment.sequence] = count
            if count >= _ABSENT_BEATS:
                lost.append(_failed(assignment, beat, now_us))
        self._forget_all_but({a.sequence for a in outstanding})
        return tuple(lost)

    def _forget_all_but(self, sequences: set[int]) -> None:
        for sequence in [s for s in self._absent if s not in sequences]:
            del self._absent[sequence]


def _failed(assignment: Assignment, beat: mesh_pb2.Heartbeat, now_us: int) -> AssignmentFailed:
    held = {latent.request_id: latent.steps_done for latent in beat.latents}
    return AssignmentFailed(
        at_us=now_us,
        sequence=assignment.sequence,
        worker=beat.worker,
        jobs=tuple(
            JobProgress(request=m.request, attempt=m.attempt, steps_done=held[m.request])
            for m in assignment.batch
            if m.request in held
        ),
        reason=MESSAGE_LOST,
    )
