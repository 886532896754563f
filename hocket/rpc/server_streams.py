"""Response streams of a gRPC server, each served from its first message to its last in one task.

grpc's own way drives a handler's generator from outside, and drops it where it stands when the
call ends: the interpreter closes it later, in another task. Whatever the generator had entered is
then left in a context that it was not entered in (OpenTelemetry says so in a traceback), and its
cleaning up comes whenever it comes. Here the generator is closed in the task that runs it, before
the call is over.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from contextlib import aclosing, suppress
from typing import Any

import grpc

from hocket.errors import RequestFailed, to_status
from hocket.rpc.interceptors import Handler, Wrapping

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0


class StreamsInOneTask(Wrapping):
    """Belongs in front of all other interceptors."""

    def __init__(self, stall_s: float | None = None) -> None:
        """`stall_s`: a caller that takes nothing for so long is ended; None: it never is."""
        super().__init__()
        self._stall_s = stall_s

    def wrapped(self, handler: Handler, method: str) -> Handler:
        if not handler.response_streaming:
            return handler
        serve = handler.stream_stream if handler.request_streaming else handler.unary_stream
        if not inspect.isasyncgenfunction(serve):
            return handler
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(
            self._written(serve, method), handler.request_deserializer, handler.response_serializer
        )

    def _written(self, serve: Any, method: str) -> Any:
        async def write(asked: Any, context: Any) -> None:
            async with aclosing(serve(asked, context)) as responses:
                async for response in responses:
                    try:
                        async with asyncio.timeout(self._stall_s):
                            await context.write(response)
                    except TimeoutError:
                        break
                else:
                    return
            log.warning("a caller of %s took nothing for %g s", method, self._stall_s)
            await _end(context, f"nothing was taken for {self._stall_s:g} s")

        return write


async def _end(context: Any, told: str) -> None:
    status = to_status(RequestFailed("CALLER_TOO_SLOW", told))
    with suppress(TimeoutError):
        # It goes behind what the caller does not take. Whoever takes nothing at all is left to the
        # keepalive of its connection: nothing of the call is held here any longer.
        async with asyncio.timeout(_GOODBYE_S):
            await context.abort(status.code, status.details, status.trailing_metadata)
    raise asyncio.CancelledError
