"""The door of a replica: every call of the service goes through it."""

from __future__ import annotations

from control.entrance.doorway import Doorway
from hocket.v1.control_pb2 import DESCRIPTOR


def test_every_call_of_the_service_is_passed_on() -> None:
    """One that was left out would be UNIMPLEMENTED at each replica."""
    service = DESCRIPTOR.services_by_name["ControlService"]
    assert {method.name for method in service.methods} <= set(vars(Doorway))
