"""What interceptors of an asyncio gRPC server have in common: each method is wrapped once.

grpc asks an interceptor for the handler of every single call. Making one anew each time is most of
what an interceptor costs; the asking is the rest, so that a server with many short calls has its
methods wrapped when they are registered (`WrappedServer`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc

# In quotes: these classes take parameters in grpc's type stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Found: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Call: TypeAlias = "grpc.HandlerCallDetails"


class Wrapping(grpc.aio.ServerInterceptor):
    """Serves calls by `wrapped` handlers."""

    def __init__(self) -> None:
        self._made: dict[str | bytes, tuple[Handler, Handler]] = {}  # by method: theirs, ours

    @abstractmethod
    def wrapped(self, handler: Handler, method: str) -> Handler:
        """The handler that serves instead; the same one where nothing is to be done."""

    async def intercept_service(
        self, continuation: Callable[[Call], Awaitable[Found]], handler_call_details: Call
    ) -> Found:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        made = self._made.get(method)
        if made is None or made[0] is not handler:
            name = method.decode() if isinstance(method, bytes) else method
            made = self._made[method] = handler, self.wrapped(handler, name)
        return made[1]


class WrappedServer:
    """A server as the generated `add_…_to_server` see it: methods are wrapped as they come.

    To be used instead of handing the same wrappings to the server as interceptors.
    """

    def __init__(self, server: grpc.aio.Server, wrappings: Sequence[Wrapping]) -> None:
        """The first of `wrappings` is the outermost."""
        self._server = server
        self._wrappings = tuple(wrappings)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Registers handlers that are asked for each call; each method is wrapped at its first."""
        wrapped = tuple(_WrappedHandlers(one, self._wrapped) for one in handlers)
        self._server.add_generic_rpc_handlers(wrapped)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Handler]
    ) -> None:
        """Registers handlers by the names of their methods."""
        self._server.add_registered_method_handlers(
            service_name,
            {
                name: self._wrapped(handler, f"/{service_name}/{name}")
                for name, handler in method_handlers.items()
            },
        )

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        for wrapping in reversed(self._wrappings):
            handler = wrapping.wrapped(handler, method)
        return handler


class _WrappedHandlers(grpc.GenericRpcHandler):
    def __init__(
        self, handlers: grpc.GenericRpcHandler, wrap: Callable[[Handler, str], Handler]
    ) -> None:
        self._handlers = handlers
        self._wrap = wrap
        self._made: dict[str, tuple[Handler, Handler]] = {}  # by method: theirs, ours

    def service(self, handler_call_details: Call) -> Found:
        handler = self._handlers.service(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        made = self._made.get(method)
        if made is None or made[0] is not handler:
            made = self._made[method] = handler, self._wrap(handler, method)
        return made[1]
