"""Of the answers "on time", how many were kept: what a promise of this cluster is worth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hocket.v1 import control_pb2, mesh_pb2


@dataclass
class Figures:
    """Counts of requests with a deadline that ended under this leader, without cancelled ones."""

    promised: int = 0
    kept: int = 0
    with_deadline: int = 0
    on_time: int = 0
    decided: Counter[str] = field(default_factory=Counter)  # with a deadline, by model …
    missed: Counter[str] = field(default_factory=Counter)  # … and those not on time

    def count(self, ended: mesh_pb2.RequestEvent, model: str, *, promised: bool) -> None:
        """Counts a request with a deadline that has just ended; `promised`: it was told so."""
        if ended.HasField("cancelled"):
            return
        on_time = ended.HasField("finished") and ended.finished.on_time
        self.with_deadline += 1
        self.on_time += on_time
        self.decided[model] += 1
        self.missed[model] += not on_time
        if promised:
            self.promised += 1
            self.kept += on_time

    def to_message(self) -> control_pb2.PromiseFigures:
        return control_pb2.PromiseFigures(
            promised=self.promised,
            kept=self.kept,
            with_deadline=self.with_deadline,
            on_time=self.on_time,
        )
