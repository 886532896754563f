"""One span for each RPC served, in the trace of whoever asked.

OpenTelemetry's own interceptor for asyncio servers formats a traceback for each call that a handler
refuses, which under overload, when every call is refused, is most of what a server then does.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from opentelemetry.context import Context, attach, detach
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from hocket.rpc.interceptors import Handler, Wrapping

_NOWHERE = Context()
_STATUS = "rpc.grpc.status_code"
# The server's fault, as OpenTelemetry's conventions for RPC count it.
_FAULTS = {
    code.value[0]
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
}


class ServerSpans(Wrapping):
    """The span is the current one while the handler runs. Stands behind `StreamsInOneTask`."""

    def __init__(self, tracer: Tracer, is_traced: Callable[[str], bool]) -> None:
        """`is_traced` is asked with the full name of a method."""
        super().__init__()
        self._tracer = tracer
        self._is_traced = is_traced

    def wrapped(self, handler: Handler, method: str) -> Handler:
        if not self._is_traced(method):
            return handler
        name = "_".join(
            "stream" if streaming else "unary"
            for streaming in (handler.request_streaming, handler.response_streaming)
        )
        serve = getattr(handler, name)
        if handler.response_streaming and not inspect.isasyncgenfunction(serve):
            return handler
        wrap = self._stream if handler.response_streaming else self._single
        make = getattr(grpc, f"{name}_rpc_method_handler")
        made: Handler = make(
            wrap(serve, method), handler.request_deserializer, handler.response_serializer
        )
        return made

    def _single(self, serve: Any, method: str) -> Any:
        said = _attributes(method)

        async def answer(asked: Any, context: Any) -> Any:
            with self._span(method, said, context):
                return await serve(asked, context)

        return answer

    def _stream(self, serve: Any, method: str) -> Any:
        said = _attributes(method)

        async def answer(asked: Any, context: Any) -> AsyncIterator[Any]:
            with self._span(method, said, context):
                async with aclosing(serve(asked, context)) as responses:
                    async for response in responses:
                        yield response

        return answer

    @contextmanager
    def _span(
        self, method: str, attributes: Mapping[str, AttributeValue], context: Any
    ) -> Iterator[None]:
        told = {key: value for key, value in context.invocation_metadata() or ()}
        parent = extract(told) if "traceparent" in told else _NOWHERE
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)
        token = attach(set_span_in_context(span, parent))
        try:
            yield
        except grpc.aio.AbortError:
            code = _code(context)
            span.set_attribute(_STATUS, code)
            if code in _FAULTS:
                span.set_status(Status(StatusCode.ERROR))
            raise
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            detach(token)
            span.end()


def _attributes(method: str) -> dict[str, AttributeValue]:
    service, _, name = method.strip("/").rpartition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, _STATUS: 0}


def _code(context: Any) -> int:
    code = context.code()
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code)
