"""ControlService as a replica serves it all along: the leader's, while this one leads.

A call that was let in ends when the leadership does: whoever asks is told who leads instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from control.leading.promises import Deposed
from hocket.cancelling import one_done
from hocket.errors import NotLeader, to_status
from hocket.v1 import control_pb2_grpc

Servicer = control_pb2_grpc.ControlServiceServicer
Context = Any  # grpc's type is generic over each call's messages


def _answered(method: str) -> Any:
    """A call with one answer, passed on."""

    async def call(door: Doorway, asked: Any, context: Context) -> Any:
        return await door._asked(context, lambda led: getattr(led, method)(asked, context))

    return call


def _streamed(method: str) -> Any:
    """A call with a stream of answers, passed on."""

    async def call(door: Doorway, asked: Any, context: Context) -> AsyncIterator[Any]:
        async for answer in door._told(context, lambda led: getattr(led, method)(asked, context)):
            yield answer

    return call


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

    Submit = _answered("Submit")
    Attach = _streamed("Attach")
    GetRequest = _answered("GetRequest")
    ListRequests = _answered("ListRequests")
    DeleteRequest = _answered("DeleteRequest")
    CancelRequest = _answered("CancelRequest")
    DrainWorker = _answered("DrainWorker")
    WatchCluster = _streamed("WatchCluster")
    RegisterWorkflow = _answered("RegisterWorkflow")
    ListWorkflows = _answered("ListWorkflows")
    GetWorkflow = _answered("GetWorkflow")
    DeleteWorkflow = _answered("DeleteWorkflow")

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
            loop = asyncio.get_running_loop()
            over = loop.create_task(self._over.wait())
            stream = aiter(call(self._servicer))
            try:
                while await _first(step := loop.create_task(anext(stream, None)), over):
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
        await one_done(work, over)
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        elif not work.cancelled():
            work.exception()  # looked at, even where the caller is gone and nobody asks for it
    return work.done() and not work.cancelled()
