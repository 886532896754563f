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

from control.scheduler.failures import MESSAGE_LOST
from control.scheduler.values import Assignment, AssignmentFailed, JobProgress
from hocket.v1 import mesh_pb2

_ABSENT_BEATS = 4  # a message under way is absent from one or two …
_ABSENT_US = 1_000_000  # … and after a pause of ours, many old heartbeats come at once


@dataclass
class _Absence:
    since_us: int
    beat: int  # number of the heartbeat that began it
    told: bool = False


class LostMessages:
    """Remembers since when each outstanding assignment has not been named by its first member."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._absent: dict[int, _Absence] = {}

    def check(
        self,
        beats: Mapping[str, mesh_pb2.Heartbeat],
        outstanding: Sequence[Assignment],
        now_us: int,
    ) -> tuple[AssignmentFailed, ...]:
        """The assignments that must have been lost; each is told once.

        `beats` holds the newest heartbeat of each living worker.
        """
        absent: dict[int, _Absence] = {}
        lost = []
        named: dict[str, set[int]] = {}
        for assignment in outstanding:
            worker = assignment.workers[0]
            beat = beats.get(worker)
            if beat is None:
                continue  # its lease says what became of it
            if worker not in named:
                named[worker] = set(beat.pending_sequences) if beat.term == self._term else set()
            if assignment.sequence in named[worker]:
                continue
            known = self._absent.get(assignment.sequence) or _Absence(now_us, beat.sequence)
            absent[assignment.sequence] = known
            long = now_us - known.since_us >= _ABSENT_US
            if not known.told and long and beat.sequence - known.beat >= _ABSENT_BEATS:
                known.told = True
                lost.append(_failed(assignment, beat, now_us))
        self._absent = absent
        return tuple(lost)


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
