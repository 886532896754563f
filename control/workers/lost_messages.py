"""Finds assignments that got lost between control and a worker, from what heartbeats do not say.

Core NATS delivers at most once: when the broker restarts, an assignment or the report of its end
can vanish, and nobody would wait for it any more. A heartbeat names every assignment that its
worker has received and not yet reported the end of. One that is outstanding here and stays absent
there, for some heartbeats and some time on control's own clock, is taken for failed; its steps are
planned anew from the latest latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from control.scheduler.resilience.failures import MESSAGE_LOST
from control.scheduler.values import Assignment, AssignmentFailed, JobProgress
from hocket.v1 import mesh_pb2

_ABSENT_BEATS = 4  # a message under way is absent from one or two …
_ABSENT_US = 1_000_000  # … and after a pause of ours, many old heartbeats come at once


@dataclass
class _Absence:
    since_us: int
    beat: int  # number of the heartbeat that began it
    incarnation: str  # of the process whose heartbeats these are
    told: bool = False

    def is_long(self, now_us: int, beat: int) -> bool:
        return now_us - self.since_us >= _ABSENT_US and beat - self.beat >= _ABSENT_BEATS


class LostMessages:
    """Remembers since when each outstanding assignment has not been named by a member."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._absent: dict[tuple[int, str], _Absence] = {}  # by sequence and member
        # Incarnation and number of the heartbeat that first named what is called off.
        self._called_off: dict[str, tuple[str, int]] = {}

    def still_running(
        self, beats: Mapping[str, mesh_pb2.Heartbeat], outstanding: Sequence[Assignment]
    ) -> tuple[str, ...]:
        """Workers that go on naming assignments which were called off: a truncation was lost."""
        known = {assignment.sequence for assignment in outstanding}
        called_off: dict[str, tuple[str, int]] = {}
        for worker, beat in sorted(beats.items()):
            if beat.term == self._term and not known.issuperset(beat.pending_sequences):
                first = self._called_off.get(worker)
                if first is None or first[0] != beat.incarnation:
                    first = (beat.incarnation, beat.sequence)
                called_off[worker] = first
        self._called_off = called_off
        return tuple(
            worker
            for worker, (_, first) in called_off.items()
            if beats[worker].sequence - first >= _ABSENT_BEATS
        )

    def check(
        self,
        beats: Mapping[str, mesh_pb2.Heartbeat],
        outstanding: Sequence[Assignment],
        now_us: int,
    ) -> tuple[AssignmentFailed, ...]:
        """The assignments that must have been lost; each is told once.

        `beats` holds the newest heartbeat of each living worker.
        """
        absent: dict[tuple[int, str], _Absence] = {}
        lost: dict[int, AssignmentFailed] = {}
        named = {
            worker: set(beat.pending_sequences) if beat.term == self._term else set()
            for worker, beat in beats.items()
        }
        for assignment in outstanding:
            # Those without a lease need no look: its end says what became of their assignments.
            for worker in (w for w in assignment.workers if w in beats):
                if assignment.sequence in named[worker]:
                    continue
                key, beat = (assignment.sequence, worker), beats[worker]
                known = self._absent.get(key)
                if known is None or known.incarnation != beat.incarnation:
                    known = _Absence(now_us, beat.sequence, beat.incarnation)
                absent[key] = known
                if not known.told and known.is_long(now_us, beat.sequence):
                    known.told = True
                    lost.setdefault(assignment.sequence, _failed(assignment, beat, now_us))
        self._absent = absent
        return tuple(lost.values())


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
