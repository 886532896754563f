"""What a replica hears while it stands by."""

from __future__ import annotations

from typing import Any

import pytest

from control.config import ControlSettings
from control.service import Replica
from hocket.clock import ManualClock
from hocket.errors import Refused
from hocket.v1 import mesh_pb2


async def test_heartbeats_are_checked_before_they_give_a_lease() -> None:
    nothing: Any = None
    replica = Replica(ControlSettings(), ManualClock(5), nothing, nothing, nothing, nothing)
    for name in ("a b", "w0\n", "x" * 5000, ""):
        with pytest.raises(Refused):
            await replica._heartbeat(mesh_pb2.Heartbeat(worker=name, incarnation="i", sequence=1))
    assert not replica._leases.alive
    await replica._heartbeat(mesh_pb2.Heartbeat(worker="w0", incarnation="i", sequence=1))
    assert list(replica._leases.alive) == ["w0"]
