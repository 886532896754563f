"""Which role may call what of ControlService, where certificates are in use.

Gateways carry requests; operators look and drain; nobody else is let in, workers neither: they
speak over the broker, whose rules are its own (hocket/security/broker_rules.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from hocket.errors import AccessDenied, to_status
from hocket.security.identity import role_of

_SERVICE = "/hocket.v1.ControlService/"
_OPERATORS_ONLY = ("DrainWorker",)
_EVERYBODY = ("/grpc.health.v1.Health/",)
Handler = Any  # of grpc's four kinds


class RoleCheck(grpc.aio.ServerInterceptor):
    """Ends a call with PERMISSION_DENIED unless its caller's certificate has the right role."""

    def __init__(self) -> None:
        self.refused = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_EVERYBODY):
            return handler
        return _guarded(handler, method, self)

    async def check(self, method: str, context: Any) -> None:
        """Aborts the call of a role that may not make it."""
        role = role_of(context)
        if role is None or not may_call(role, method):
            self.refused += 1
            denied = AccessDenied(what=method.rpartition("/")[2], who=role or "a caller unknown")
            await context.abort_with_status(to_status(denied))


def may_call(role: str, method: str) -> bool:
    """Whether a role may call a method, given as "/package.Service/Method"."""
    if role == "operator":
        return True
    name = method.removeprefix(_SERVICE)
    return role == "gateway" and method.startswith(_SERVICE) and name not in _OPERATORS_ONLY


def _guarded(handler: Handler, method: str, check: RoleCheck) -> Handler:
    many_in, many_out = handler.request_streaming, handler.response_streaming
    inner = (
        (handler.stream_stream if many_in else handler.unary_stream)
        if many_out
        else (handler.stream_unary if many_in else handler.unary_unary)
    )

    async def single(request: Any, context: Any) -> Any:
        await check.check(method, context)
        return await inner(request, context)

    async def stream(request: Any, context: Any) -> Any:
        await check.check(method, context)
        async for response in inner(request, context):
            yield response

    kind = f"{'stream' if many_in else 'unary'}_{'stream' if many_out else 'unary'}"
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    serve = stream if many_out else single
    return make(serve, handler.request_deserializer, handler.response_serializer)
