"""ControlService: what gateways and the command line ask of the leader.

Each call is a few lines over the objects that do it: admission, attachments, records, the view of
the cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from typing import NoReturn, TypeAlias, TypeVar

import grpc

from control.admission import AdmissionControl
from control.driver import Driver
from control.entrance.door import check_submit
from control.requests import telling
from control.requests.attach import Attachments, GrpcLine
from control.requests.endings import Endings, PromiseLog
from control.requests.lifecycle import LifecycleState
from control.requests.records import Record, Records
from control.scheduler.values import CancelRequested, DrainRequested
from control.workers.cluster_view import ClusterView
from control.workers.leases import Leases
from control.workflow_registry import WorkflowRegistry
from hocket.errors import (
    HocketError,
    InvalidRequest,
    Refused,
    UnknownRequest,
    UnknownWorker,
    Violation,
    to_status,
)
from hocket.tracing import telemetry
from hocket.v1 import control_pb2, control_pb2_grpc, workflows_pb2

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")
# In quotes: the class takes parameters in grpc's type stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Q, A]"


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Serves one term."""

    def __init__(
        self,
        driver: Driver,
        promises: PromiseLog,
        records: Records,
        leases: Leases,
        admission: AdmissionControl,
        attachments: Attachments,
        endings: Endings,
        view: ClusterView,
        workflows: WorkflowRegistry,
    ) -> None:
        self._driver = driver
        self._promises = promises
        self._records = records
        self._leases = leases
        self._admission = admission
        self._attachments = attachments
        self._endings = endings
        self._view = view
        self._workflows = workflows

    async def Submit(
        self,
        request: control_pb2.SubmitRequest,
        context: Context[control_pb2.SubmitRequest, control_pb2.SubmitResponse],
    ) -> control_pb2.SubmitResponse:
        violations = check_submit(request)
        if violations:
            await _abort(context, InvalidRequest(violations))
        return await self._admission.submit(request, telemetry.traceparent())

    async def Attach(
        self,
        request_iterator: AsyncIterable[control_pb2.AttachRequest],
        context: Context[control_pb2.AttachRequest, control_pb2.AttachResponse],
    ) -> AsyncIterator[control_pb2.AttachResponse]:
        line = GrpcLine(request_iterator)
        served = asyncio.ensure_future(self._attachments.attach(line))
        served.add_done_callback(lambda _: line.end())
        try:
            async for message in line.messages():
                yield message
            await served
        finally:
            served.cancel()
            await asyncio.wait((served,))

    async def GetRequest(
        self,
        request: control_pb2.GetRequestRequest,
        context: Context[control_pb2.GetRequestRequest, control_pb2.GetRequestResponse],
    ) -> control_pb2.GetRequestResponse:
        record = self._known(request)
        if record is None:
            await _abort(context, UnknownRequest(request.request_id))
        return control_pb2.GetRequestResponse(status=telling.status(record))

    async def ListRequests(
        self,
        request: control_pb2.ListRequestsRequest,
        context: Context[control_pb2.ListRequestsRequest, control_pb2.ListRequestsResponse],
    ) -> control_pb2.ListRequestsResponse:
        try:
            return telling.page(self._records, request)
        except ValueError:
            said = f"{request.page_token!r}; allowed: what the page before said"
            await _abort(context, InvalidRequest((Violation("page_token", said),)))

    async def DeleteRequest(
        self,
        request: control_pb2.DeleteRequestRequest,
        context: Context[control_pb2.DeleteRequestRequest, control_pb2.DeleteRequestResponse],
    ) -> control_pb2.DeleteRequestResponse:
        record = self._known(request)
        if record is None:
            await _abort(context, UnknownRequest(request.request_id))
        if record.is_open:
            told = f"request {record.id} has not ended; cancel it first"
            await _abort(context, Refused("NOT_ENDED", told))
        await self._promises.forget(record.id)
        if self._records.get(record.id) is record:
            self._records.forget(record.id)
        return control_pb2.DeleteRequestResponse()

    async def CancelRequest(
        self,
        request: control_pb2.CancelRequestRequest,
        context: Context[control_pb2.CancelRequestRequest, control_pb2.CancelRequestResponse],
    ) -> control_pb2.CancelRequestResponse:
        record = self._records.get(request.request_id)
        tenant = request.tenant if request.HasField("tenant") else None
        if record is None or tenant not in (None, record.tenant):
            await _abort(context, UnknownRequest(request.request_id))
        running = record.state is LifecycleState.RECEIVED or record.is_open
        if record.state is LifecycleState.RECEIVED:
            await self._admission.cancel(record.id)
        elif record.is_open:
            self._driver.post(CancelRequested(at_us=self._driver.stamp(), request=record.id))
        await self._endings.over(record)  # else the next leader would run it
        return control_pb2.CancelRequestResponse(was_running=running)

    async def DrainWorker(
        self,
        request: control_pb2.DrainWorkerRequest,
        context: Context[control_pb2.DrainWorkerRequest, control_pb2.DrainWorkerResponse],
    ) -> control_pb2.DrainWorkerResponse:
        lease = self._leases.alive.get(request.worker)
        if lease is None and request.worker not in await self._draining():
            known = tuple(sorted(self._leases.alive))
            await _abort(context, UnknownWorker(request.worker, known))
        draining = not request.undo
        await self._promises.drain(request.worker, draining)
        self._driver.post(
            DrainRequested(at_us=self._driver.stamp(), worker=request.worker, draining=draining)
        )
        await self._view.changed()
        held = 0 if lease is None else len(lease.heartbeat.latents)
        return control_pb2.DrainWorkerResponse(jobs_held=held)

    async def WatchCluster(
        self,
        request: control_pb2.WatchClusterRequest,
        context: Context[control_pb2.WatchClusterRequest, control_pb2.WatchClusterResponse],
    ) -> AsyncIterator[control_pb2.WatchClusterResponse]:
        async for state in self._view.watch():
            yield state

    async def RegisterWorkflow(
        self,
        request: workflows_pb2.RegisterWorkflowRequest,
        context: Context[
            workflows_pb2.RegisterWorkflowRequest, workflows_pb2.RegisterWorkflowResponse
        ],
    ) -> workflows_pb2.RegisterWorkflowResponse:
        checks = self._workflows.register(request.workflow, only_check=request.validate_only)
        return workflows_pb2.RegisterWorkflowResponse(workflow=await _told(context, checks))

    async def ListWorkflows(
        self,
        request: workflows_pb2.ListWorkflowsRequest,
        context: Context[workflows_pb2.ListWorkflowsRequest, workflows_pb2.ListWorkflowsResponse],
    ) -> workflows_pb2.ListWorkflowsResponse:
        found = await _told(context, self._workflows.all())
        return workflows_pb2.ListWorkflowsResponse(workflows=found)

    async def GetWorkflow(
        self,
        request: workflows_pb2.GetWorkflowRequest,
        context: Context[workflows_pb2.GetWorkflowRequest, workflows_pb2.GetWorkflowResponse],
    ) -> workflows_pb2.GetWorkflowResponse:
        found = await _told(context, self._workflows.get(request.name))
        return workflows_pb2.GetWorkflowResponse(workflow=found)

    async def DeleteWorkflow(
        self,
        request: workflows_pb2.DeleteWorkflowRequest,
        context: Context[workflows_pb2.DeleteWorkflowRequest, workflows_pb2.DeleteWorkflowResponse],
    ) -> workflows_pb2.DeleteWorkflowResponse:
        await _told(context, self._workflows.delete(request.name))
        return workflows_pb2.DeleteWorkflowResponse()

    async def _draining(self) -> tuple[str, ...]:
        return await self._driver.ask(lambda scheduler: scheduler.draining())

    def _known(
        self, asked: control_pb2.GetRequestRequest | control_pb2.DeleteRequestRequest
    ) -> Record | None:
        record = self._records.get(asked.request_id)
        tenant = asked.tenant if asked.HasField("tenant") else None
        return record if record is not None and telling.is_known(record, tenant) else None


async def _told(context: Context[Q, A], work: Awaitable[T]) -> T:
    """What the work gives; a typed error ends the call with its status."""
    try:
        return await work
    except HocketError as error:
        await _abort(context, error)


async def _abort(context: Context[Q, A], error: HocketError) -> NoReturn:
    await context.abort_with_status(to_status(error))
    raise AssertionError("abort_with_status raises") from error
