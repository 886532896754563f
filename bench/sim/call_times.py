"""What a call takes on the simulated workers.

As the profile says; on a host whose workers share cores, memory or power it depends on the others:

    worker a   [ step, alone ][ step,   beside ][ step,   beside ]
    worker b                      [ step,      beside     ]          judged as each step begins
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from control.scheduler.settings import Settings
from control.scheduler.times.estimate import Estimator
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import Assignment, Request


class Contention(msgspec.Struct, frozen=True, kw_only=True):
    """Two more profiles, of workers only: control plans with the Case's own.

    `alone_csv`: while no other worker of the host computes; `beside_csv`: while another does.
    """

    alone_csv: str
    beside_csv: str


class CallTimes:
    """Call times in microseconds, looked up once a cell."""

    def __init__(
        self,
        profile: Profile,
        gpu: str,
        settings: Settings,
        contention: Contention | None,
        kinds: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`kinds`: of GPU by worker, where they differ. Raises: ProfileError."""
        texts = () if contention is None else (contention.alone_csv, contention.beside_csv)
        profiles = [Profile.from_csv(text) for text in texts] or [profile]
        self._estimators = [Estimator(p, settings) for p in profiles]
        self._gpu = gpu
        self._kinds = kinds
        self._known: dict[CellKey, tuple[int, int]] = {}

    @property
    def differ(self) -> bool:
        """It matters what the others of the host do."""
        return len(self._estimators) > 1

    def of(self, a: Assignment, request: Request) -> tuple[int, int]:
        """Of one step of an assignment, alone and beside others; `request`: one of its batch."""
        if not self._kinds:
            return self._on(self._gpu, a, request)
        kinds = {self._kinds.get(worker, self._gpu) for worker in a.workers}
        return max(self._on(gpu, a, request) for gpu in sorted(kinds))

    def _on(self, gpu: str, a: Assignment, request: Request) -> tuple[int, int]:
        """The slowest member of a group sets the pace."""
        key = CellKey(request.model, gpu, a.node, request.shape, a.layout, len(a.batch))
        known = self._known.get(key)
        if known is None:
            times = [max(1, round(e.estimate_us(key))) for e in self._estimators]
            known = self._known[key] = (times[0], times[-1])
        return known
