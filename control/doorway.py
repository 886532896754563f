"""ControlService as a replica serves it all along: the leader's, while this one leads.

A call that was let in ends when the leadership does: whoever asks is told who leads instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from control.promises import Deposed
from hocket.errors import NotLeader, to_status
from hocket.v1 import control_pb2, control_pb2_grpc

Servicer = control_pb2_grpc.ControlServiceServicer
Context = Any  # grpc's type is generic over each call's messages


class Doorway(Servicer):
    """Passes calls on to whoever leads here."""

    def __init__(self, leader: Callable[[], str]) -> None:
        """`leader` tells the leading replica's address; empty: nobody's known."""
        self._leader = leader
        self._servicer: Servicer | None = None
        self._over = asyncio.Event()

    def open(self, servicer: Servicer) -> None:
        """This replica leads."""
        self._servicer, self._over = servicer, asyncio.Event()

    def shut(self) -> None:
        """It does not any more; calls under way end."""
        self._servicer = None
        self._over.set()

    async def Submit(
        self, request: control_pb2.SubmitRequest, context: Context
    ) -> control_pb2.SubmitResponse:
        answer: control_pb2.SubmitResponse
        answer = await self._asked(context, lambda led: led.Submit(request, context))
        return answer

    async def Attach(
        self, request_iterator: Any, context: Context
    ) -> AsyncIterator[control_pb2.AttachResponse]:
        async for message in self._told(context, lambda led: led.Attach(request_iterator, context)):
            yield message

    async def GetRequest(
        self, request: control_pb2.GetRequestRequest, context: Context
    ) -> control_pb2.GetRequestResponse:
        answer: control_pb2.GetRequestResponse
        answer = await self._asked(context, lambda led: led.GetRequest(request, context))
        return answer

    async def ListRequests(
        self, request: control_pb2.ListRequestsRequest, context: Context
    ) -> control_pb2.ListRequestsResponse:
        answer: control_pb2.ListRequestsResponse
        answer = await self._asked(context, lambda led: led.ListRequests(request, context))
        return answer

    async def DeleteRequest(
        self, request: control_pb2.DeleteRequestRequest, context: Context
    ) -> control_pb2.DeleteRequestResponse:
        answer: control_pb2.DeleteRequestResponse
        answer = await self._asked(context, lambda led: led.DeleteRequest(request, context))
        return answer

    async def CancelRequest(
        self, request: control_pb2.CancelRequestRequest, context: Context
    ) -> control_pb2.CancelRequestResponse:
        answer: control_pb2.CancelRequestResponse
        answer = await self._asked(context, lambda led: led.CancelRequest(request, context))
        return answer

    async def WatchCluster(
        self, request: control_pb2.WatchClusterRequest, context: Context
    ) -> AsyncIterator[control_pb2.WatchClusterResponse]:
        async for message in self._told(context, lambda led: led.WatchCluster(request, context)):
            yield message

    async def DrainWorker(
        self, request: control_pb2.DrainWorkerRequest, context: Context
    ) -> control_pb2.DrainWorkerResponse:
        answer: control_pb2.DrainWorkerResponse
        answer = await self._asked(context, lambda led: led.DrainWorker(request, context))
        return answer

    async def _asked(self, context: Context, call: Callable[[Servicer], Any]) -> Any:
        """The answer of a call to the leader here."""
        if self._servicer is not None:
            over = asyncio.ensure_future(self._over.wait())
            work = asyncio.ensure_future(call(self._servicer))
            try:
                if await _first(work, over):
                    with suppress(Deposed):  # the next leader is to be asked
                        return work.result()
            finally:
                over.cancel()
        await context.abort_with_status(to_status(NotLeader(self._leader())))

    async def _told(self, context: Context, call: Callable[[Servicer], Any]) -> AsyncIterator[Any]:
        """The messages of a streaming call to the leader here."""
        if self._servicer is not None:
            over = asyncio.ensure_future(self._over.wait())
            stream = aiter(call(self._servicer))
            try:
                while await _first(step := asyncio.ensure_future(anext(stream, None)), over):
                    message = step.result()
                    if message is None:
                        return
                    yield message
            except Deposed:  # the next leader is to be asked
                pass
            finally:
                over.cancel()
        await context.abort_with_status(to_status(NotLeader(self._leader())))


async def _first(work: asyncio.Future[Any], over: asyncio.Future[Any]) -> bool:
    """Whether `work` was done before the leadership was over; else it is cancelled."""
    try:
        await asyncio.wait({work, over}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        elif not work.cancelled():
            work.exception()  # looked at, even where the caller is gone and nobody asks for it
    return work.done() and not work.cancelled()
