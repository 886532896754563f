"""google.longrunning.Operations: requests under their standard names.

The operation of a request is "operations/<request id>", its metadata GenerationMetadata, its
response Finished, its error the status that Generate would have ended with.
"""

from __future__ import annotations

from google.longrunning import operations_pb2 as lro
from google.longrunning.operations_pb2_grpc import OperationsServicer
from google.protobuf.empty_pb2 import Empty

from gateway.callers import Callers
from gateway.calls import Calls
from gateway.error_statuses import Context
from gateway.limits import CallLimit
from gateway.messages import was_cancelled
from hocket.errors import InvalidRequest, RequestFailed, UnknownRequest, Violation, to_rpc_status
from hocket.v1.control_pb2 import ListRequestsRequest, RequestStatus
from hocket.v1.generation_pb2 import GenerationState

PREFIX = "operations/"
_STATE = "GENERATION_STATE_"
_WAIT_S_MAX = 24 * 3600


class GenerationOperations(OperationsServicer):  # type: ignore[misc]  # ships without types
    """Gets, lists, waits for, cancels and deletes requests."""

    def __init__(self, calls: Calls, limit: CallLimit, callers: Callers) -> None:
        self._calls = calls
        self._limit = limit
        self._callers = callers

    async def GetOperation(
        self, request: lro.GetOperationRequest, context: Context
    ) -> lro.Operation:
        return to_operation(await self._calls.control.get(_id(request.name), self._tenant(context)))

    async def ListOperations(
        self, request: lro.ListOperationsRequest, context: Context
    ) -> lro.ListOperationsResponse:
        answer = await self._calls.control.list(
            ListRequestsRequest(
                tenant=self._tenant(context),
                page_size=max(0, request.page_size),
                page_token=request.page_token,
                state=_state(request.filter),
            )
        )
        return lro.ListOperationsResponse(
            operations=[to_operation(status) for status in answer.requests],
            next_page_token=answer.next_page_token,
        )

    async def WaitOperation(
        self, request: lro.WaitOperationRequest, context: Context
    ) -> lro.Operation:
        wait_us = request.timeout.ToMicroseconds() if request.HasField("timeout") else None
        if wait_us is not None:
            wait_us = max(0, min(wait_us, _WAIT_S_MAX * 1_000_000))
        tenant = self._tenant(context)
        with self._limit.one():
            return to_operation(await self._calls.wait(_id(request.name), wait_us, tenant))

    async def CancelOperation(self, request: lro.CancelOperationRequest, context: Context) -> Empty:
        await self._calls.control.cancel(_id(request.name), self._tenant(context))
        return Empty()

    async def DeleteOperation(self, request: lro.DeleteOperationRequest, context: Context) -> Empty:
        await self._calls.control.delete(_id(request.name), self._tenant(context))
        return Empty()

    def _tenant(self, context: Context) -> str | None:
        return self._callers.tenant(context.invocation_metadata() or ())


def to_operation(status: RequestStatus) -> lro.Operation:
    """A request as google.longrunning sees it."""
    operation = lro.Operation(name=PREFIX + status.metadata.request_id)
    operation.metadata.Pack(status.metadata)
    match status.ended.WhichOneof("event") if status.HasField("ended") else None:
        case "finished":
            operation.done = True
            operation.response.Pack(status.ended.finished)
        case "failed":
            failed = status.ended.failed
            error = RequestFailed(failed.reason, failed.message, dict(failed.metadata))
            operation.done = True
            operation.error.CopyFrom(to_rpc_status(error))
        case "cancelled":
            told = was_cancelled(status.ended.cancelled.steps_done)
            operation.done = True
            operation.error.CopyFrom(to_rpc_status(RequestFailed("CANCELLED", told)))
    return operation


def _id(name: str) -> str:
    if not name.startswith(PREFIX) or name == PREFIX:
        raise UnknownRequest(name)
    return name.removeprefix(PREFIX)


def _state(asked: str) -> GenerationState.ValueType:
    """What a filter names: "", "RUNNING" or "state=RUNNING"."""
    name = asked.strip().removeprefix("state").lstrip(" =").strip('"').upper()
    if not name:
        return GenerationState.GENERATION_STATE_UNSPECIFIED
    name = _STATE + name.removeprefix(_STATE)
    if name not in (known := GenerationState.keys()):
        states = [key.removeprefix(_STATE) for key in known[1:]]
        allowed = f"state=S, where S is one of {', '.join(states)}"
        raise InvalidRequest((Violation("filter", f"found {asked[:60]!r}; allowed: {allowed}"),))
    return GenerationState.Value(name)
