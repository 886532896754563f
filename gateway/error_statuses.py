"""Typed errors become gRPC statuses here and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from opentelemetry import trace

from hocket.errors import HocketError, to_status
from hocket.rpc.interceptors import Handler, Wrapping
from hocket.tracing import spans

# In quotes: the class takes parameters in grpc's type stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_OURS = ("/hocket.", "/google.longrunning.", "/externalscaler.")


class ErrorStatuses(Wrapping):
    """Ends a call that raised a HocketError with its status."""

    def wrapped(self, handler: Handler, method: str) -> Handler:
        if not method.startswith(_OURS):
            return handler
        if handler.request_streaming and not handler.response_streaming:
            return grpc.stream_unary_rpc_method_handler(
                _unary(handler.stream_unary),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _unary(serve: Any) -> Any:
    async def answer(request: Any, context: Context) -> Any:
        try:
            return await serve(request, context)
        except HocketError as error:
            await _abort(context, error)

    return answer


def _stream(serve: Any) -> Any:
    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(serve(request, context)) as responses:
                async for response in responses:
                    yield response
        except HocketError as error:
            await _abort(context, error)

    return answer


async def _abort(context: Context, error: HocketError) -> None:
    trace.get_current_span().set_attribute(spans.OUTCOME, error.reason)
    status = to_status(error)
    # Not abort_with_status: OpenTelemetry's context notes the code only on abort.
    await context.abort(status.code, status.details, status.trailing_metadata)
