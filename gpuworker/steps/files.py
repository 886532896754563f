"""Files that requests brought, for the compute thread: there by the time of the call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from hocket.v1 import mesh_pb2


class InputMissing(Exception):
    """A file that a request brought is gone, or not what its name says: no other try helps.

    Fields: `request`, `name`, `reason`.
    """

    def __init__(self, request: str, name: str, reason: str) -> None:
        super().__init__(f"{name} of {request}: {reason}")
        self.request, self.name, self.reason = request, name, reason


class InputAway(Exception):
    """A file that a request brought did not come in time: nobody knows that it is gone.

    Fields: `request`, `name`, `reason`.
    """

    def __init__(self, request: str, name: str, reason: str) -> None:
        super().__init__(f"{name} of {request}: {reason}")
        self.request, self.name, self.reason = request, name, reason


class InputFiles(Protocol):
    """The store of inputs."""

    def want(self, assignment: mesh_pb2.Assignment) -> None:
        """Begins to fetch what an assignment's calls will take."""

    def take(self, request: str, name: str, timeout_s: float, off: threading.Event) -> bytes:
        """A file's content; waits so long for it, or until `off` is set.

        Raises `InputMissing`, `InputAway`, or `CalledOff`: `off` was set.
        """


class NoFiles:
    """Of a worker that no request brings files to."""

    def want(self, assignment: mesh_pb2.Assignment) -> None:
        """Nothing is fetched."""

    def take(self, request: str, name: str, timeout_s: float, off: threading.Event) -> bytes:
        raise InputAway(request, name, "this worker has no store of inputs")


def names_of(member: mesh_pb2.BatchMember) -> Sequence[tuple[str, str]]:
    """(port, name in the store) of the files that a job's call takes."""
    return [(each.port, each.object_name) for each in member.call.inputs if each.object_name]
