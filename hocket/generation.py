"""A request as an operation: where it stands, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from google.longrunning import operations_pb2 as lro

from hocket.errors import HocketError, from_rpc_status
from hocket.v1.generation_pb2 import Finished, GenerationMetadata

PREFIX = "operations/"


@dataclass(frozen=True)
class Generation:
    """One request, as it stood when it was asked for."""

    metadata: GenerationMetadata
    finished: Finished | None = None
    error: HocketError | None = None

    @property
    def request_id(self) -> str:
        return self.metadata.request_id

    @property
    def done(self) -> bool:
        return self.finished is not None or self.error is not None


def to_generation(operation: lro.Operation) -> Generation:
    """What google.longrunning says of a request."""
    metadata = GenerationMetadata()
    operation.metadata.Unpack(metadata)
    if operation.HasField("error"):
        return Generation(metadata, error=from_rpc_status(operation.error))
    finished = Finished()
    if operation.done and operation.response.Unpack(finished):
        return Generation(metadata, finished)
    return Generation(metadata)
