"""Of the answers "on time", how many were kept: what a promise of this cluster is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hocket.v1 import control_pb2

if TYPE_CHECKING:
    from control.requests.records import Record


@dataclass
class Figures:
    """Counts of requests with a deadline that ended under this leader, without cancelled ones."""

    promised: int = 0
    kept: int = 0
    with_deadline: int = 0
    on_time: int = 0

    def count(self, record: Record) -> None:
        """Counts a request that has just ended."""
        ended = record.ended
        if ended is None or ended.HasField("cancelled") or not _has_deadline(record):
            return
        on_time = ended.HasField("finished") and ended.finished.on_time
        self.with_deadline += 1
        self.on_time += on_time
        if record.accepted.predicted_on_time:
            self.promised += 1
            self.kept += on_time

    def to_message(self) -> control_pb2.PromiseFigures:
        return control_pb2.PromiseFigures(
            promised=self.promised,
            kept=self.kept,
            with_deadline=self.with_deadline,
            on_time=self.on_time,
        )


def _has_deadline(record: Record) -> bool:
    return bool(record.submit.request.slo.deadline_us)
