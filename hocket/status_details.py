"""google.rpc details of a status: packed, found, and taken off a failed call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

D = TypeVar("D", bound=Message)


def attached(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status that came with a failed call; without one, its message alone."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status(message=error.details() or "")


def detail(details: Iterable[any_pb2.Any], kind: type[D]) -> D | None:
    """The first detail of this kind."""
    for one in details:
        if one.TypeName() == kind.DESCRIPTOR.full_name:
            return kind.FromString(one.value)
    return None


def packed(message: Message) -> any_pb2.Any:
    """A message as a detail."""
    whole = any_pb2.Any()
    whole.Pack(message)
    return whole
