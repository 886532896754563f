"""WorkflowService: operators register workflows here, everybody sees them."""

from __future__ import annotations

from gateway.callers import Callers
from gateway.error_statuses import Context
from gateway.workflows.names import WorkflowNames
from hocket.v1.workflows_pb2 import (
    DeleteWorkflowRequest,
    DeleteWorkflowResponse,
    GetWorkflowRequest,
    GetWorkflowResponse,
    ListWorkflowsRequest,
    ListWorkflowsResponse,
    RegisterWorkflowRequest,
    RegisterWorkflowResponse,
)
from hocket.v1.workflows_pb2_grpc import WorkflowServiceServicer
from hocket.workflows.checking import checked


class WorkflowServicer(WorkflowServiceServicer):
    """Thin over `WorkflowNames`. Where callers have keys, changes take an operator's."""

    def __init__(self, names: WorkflowNames, callers: Callers) -> None:
        self._names = names
        self._callers = callers

    async def RegisterWorkflow(
        self, request: RegisterWorkflowRequest, context: Context
    ) -> RegisterWorkflowResponse:
        said = context.invocation_metadata() or ()
        if request.validate_only:
            self._callers.tenant(said)
        else:
            self._callers.operator(said, "RegisterWorkflow")
        checked(request.workflow)
        made = await self._names.register(request.workflow, only_check=request.validate_only)
        return RegisterWorkflowResponse(workflow=made)

    async def ListWorkflows(
        self, request: ListWorkflowsRequest, context: Context
    ) -> ListWorkflowsResponse:
        self._callers.tenant(context.invocation_metadata() or ())
        return ListWorkflowsResponse(workflows=await self._names.list())

    async def GetWorkflow(
        self, request: GetWorkflowRequest, context: Context
    ) -> GetWorkflowResponse:
        self._callers.tenant(context.invocation_metadata() or ())
        return GetWorkflowResponse(workflow=await self._names.get(request.name))

    async def DeleteWorkflow(
        self, request: DeleteWorkflowRequest, context: Context
    ) -> DeleteWorkflowResponse:
        self._callers.operator(context.invocation_metadata() or (), "DeleteWorkflow")
        await self._names.delete(request.name)
        return DeleteWorkflowResponse()
