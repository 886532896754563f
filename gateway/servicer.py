"""GenerationService: the public door over gRPC, thin over `gateway.calls`.

Errors are typed and become statuses in `gateway.error_statuses`. The RPC's deadline bounds how long
the caller listens and nothing else; the SLO never ends a call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from google.longrunning.operations_pb2 import Operation

from gateway.callers import Callers, Metadata
from gateway.calls import Calls
from gateway.error_statuses import Context
from gateway.inputs.uploads import Uploads
from gateway.limits import CallLimit
from gateway.operations import to_operation
from hocket.v1.generation_pb2 import (
    CancelRequest,
    CancelResponse,
    CreateGenerationRequest,
    GenerateRequest,
    GenerateResponse,
    GetMediaRequest,
    GetMediaResponse,
    ListModelsRequest,
    ListModelsResponse,
    PutInputRequest,
    PutInputResponse,
    WatchGenerationRequest,
    WatchGenerationResponse,
)
from hocket.v1.generation_pb2_grpc import GenerationServiceServicer


class GenerationServicer(GenerationServiceServicer):
    """Serves any number of calls at once; keeps no state between them."""

    def __init__(self, calls: Calls, limit: CallLimit, callers: Callers, uploads: Uploads) -> None:
        self._calls = calls
        self._uploads = uploads
        self._limit = limit
        self._callers = callers

    async def Generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncIterator[GenerateResponse]:
        request.tenant = self._callers.named(_said(context), request.tenant)
        with self._limit.one():
            async with aclosing(self._calls.generate(request)) as responses:
                async for response in responses:
                    yield response

    async def CreateGeneration(
        self, request: CreateGenerationRequest, context: Context
    ) -> Operation:
        wanted = request.request
        wanted.tenant = self._callers.named(_said(context), wanted.tenant)
        with self._limit.one():
            return to_operation(await self._calls.create(wanted))

    async def WatchGeneration(
        self, request: WatchGenerationRequest, context: Context
    ) -> AsyncIterator[WatchGenerationResponse]:
        tenant = self._callers.tenant(_said(context))
        with self._limit.one():
            watched = self._calls.watch(request.request_id, request.cursor, tenant)
            async with aclosing(watched) as responses:
                async for response in responses:
                    yield response

    async def GetMedia(
        self, request: GetMediaRequest, context: Context
    ) -> AsyncIterator[GetMediaResponse]:
        tenant = self._callers.tenant(_said(context))
        with self._limit.one():
            media = self._calls.media_of(request.request_id, request.offset, tenant)
            async with aclosing(media) as chunks:
                async for chunk in chunks:
                    yield GetMediaResponse(chunk=chunk)

    async def Cancel(self, request: CancelRequest, context: Context) -> CancelResponse:
        tenant = self._callers.tenant(_said(context))
        was_running = await self._calls.control.cancel(request.request_id, tenant)
        return CancelResponse(was_running=was_running)

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:
        self._callers.tenant(_said(context))
        return ListModelsResponse(models=self._calls.control.listed)

    async def PutInput(
        self, request_iterator: AsyncIterator[PutInputRequest], context: Context
    ) -> PutInputResponse:
        said = _said(context)
        self._callers.tenant(said)
        with self._limit.one():
            return await self._uploads.put(
                request_iterator, lambda asked: self._callers.named(said, asked)
            )


def _said(context: Context) -> Metadata:
    return context.invocation_metadata() or ()
