"""What interceptors of an asyncio gRPC server have in common: each method is wrapped once.

grpc asks an interceptor for the handler of every single call. Making one anew each time is most of
what an interceptor costs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
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
