"""What a replica hears while it stands by."""

from __future__ import annotations

import pytest

from control.config import ControlSettings
from control.service import Replica
from hocket.bus import Bus
from hocket.clock import ManualClock
from hocket.errors import Refused
from hocket.telemetry import Telemetry
from hocket.v1 import mesh_pb2


async def test_heartbeats_are_checked_before_they_give_a_lease() -> None:
    nothing: Bus | Telemetry | None = None
    settings, clock = ControlSettings(), ManualClock(5)
    replica = Replica(settings, clock, nothing, nothing, None, None)  # type: ignore[arg-type]
    for name in ("a b", "w0\n", "x" * 5000, ""):
        with pytest.raises(Refused):
            await replica._heartbeat(mesh_pb2.Heartbeat(worker=name, incarnation="i", sequence=1))
    assert not replica._leases.alive
    await replica._heartbeat(mesh_pb2.Heartbeat(worker="w0", incarnation="i", sequence=1))
    assert list(replica._leases.alive) == ["w0"]
