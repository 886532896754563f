"""The server's side of a simulated call: runs a servicer's method in its process."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from ..loop import SimulatedProcess
from ..waits import Bell
from ..wire import Wire

_WINDOW = 256  # messages that a stream sends ahead of its reader


def told_every(window: int) -> int:
    """After so many messages the reader says that there is room again."""
    return max(1, window // 4)


class Caller(Protocol):
    """The other side of a call (see link.py)."""

    channel: Any

    def take(self, data: bytes) -> None: ...
    def take_end(self, code: grpc.StatusCode, details: str, trailing: Any) -> None: ...
    def more_room(self) -> None: ...


class Aborted(Exception):
    """A handler ended its call with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.trailing = code, details, trailing


@dataclass
class ServedAddress:
    """Where a process serves."""

    address: str
    process: SimulatedProcess
    interceptors: Sequence[Any]
    handlers: list[Any]  # grpc.GenericRpcHandler

    async def handler(self, method: str) -> Any:
        """What serves a method ("/package.Service/Method"), behind the interceptors."""
        details = _Details(method, ())

        async def find(asked: _Details) -> Any:
            found = (generic.service(asked) for generic in self.handlers)
            return next((handler for handler in found if handler is not None), None)

        continuation: Any = find
        for interceptor in reversed(self.interceptors):
            continuation = partial(interceptor.intercept_service, continuation)
        handler = await continuation(details)
        if handler is None:
            raise Aborted(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ())
        return handler


class ServingNetwork(Protocol):
    """Who serves where, and the channels there (see link.py)."""

    doors: dict[str, ServedAddress]

    @property
    def channels(self) -> Sequence[Any]: ...

    def port(self) -> int: ...
    def listen(self, door: ServedAddress) -> None: ...
    def close(self, door: ServedAddress) -> None: ...


class Server:
    """What `grpc.aio.server` returns."""

    def __init__(
        self, network: ServingNetwork, process: SimulatedProcess, interceptors: Sequence[Any]
    ) -> None:
        self._network, self._process = network, process
        self._interceptors = interceptors
        self._handlers: list[Any] = []
        self._addresses: list[str] = []
        self._doors: list[ServedAddress] = []
        self._stopped = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """They are among the generic ones."""

    def add_insecure_port(self, address: str) -> int:
        host, _, port = address.rpartition(":")
        number = int(port) or self._network.port()
        if f"{host}:{number}" in self._network.doors:
            raise RuntimeError(f"Failed to bind to address {address}")
        self._addresses.append(f"{host}:{number}")
        return number

    def add_secure_port(self, address: str, credentials: object) -> int:
        return self.add_insecure_port(address)

    async def start(self) -> None:
        for address in self._addresses:
            door = ServedAddress(address, self._process, self._interceptors, self._handlers)
            self._doors.append(door)
            self._network.listen(door)

    async def stop(self, grace: float | None) -> None:
        """New calls are refused; running ones have `grace` seconds to end."""
        for door in self._doors:
            self._network.doors.pop(door.address, None)
        channels = [c for c in self._network.channels if c.door in self._doors]
        try:
            async with asyncio.timeout(grace or 0):
                for channel in channels:
                    while channel.calls:
                        await channel.calls[0].code()
        except TimeoutError:
            pass
        for door in self._doors:
            self._network.close(door)
        self._stopped.set()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        await self._stopped.wait()
        return True


@dataclass(frozen=True)
class _Details:
    method: str
    invocation_metadata: tuple[()]


class ServerCall:
    """One call as its server runs it. Made at the caller; `begin` runs at the server."""

    def __init__(
        self,
        caller: Caller,
        door: ServedAddress,
        method: str,
        down: Wire,
        ends_us: int | None,
    ) -> None:
        self._caller, self._door, self._process = caller, door, door.process
        self._method, self._down, self._ends_us = method, down, ends_us
        self.channel: Any = caller.channel
        self._handler: Any = None
        self._taken = 0
        self._requests: deque[bytes | None] = deque()  # None: no more will come
        self._arrived = Bell(door.process.loop)
        self._room = caller.channel.window  # messages that may go ahead of their reader
        self._has_room = Bell(door.process.loop)
        self._task: asyncio.Task[None] | None = None
        self._over = False

    # what comes up the wire; outside of the process

    def begin(self, data: bytes | None) -> None:
        self._inside(self._begin, data)

    def take(self, data: bytes | None) -> None:
        self._requests.append(data)
        self._arrived.ring()
        if data is not None:
            self._taken += 1
            if self._taken % told_every(_WINDOW) == 0 and not self._process.dead:
                self._down.send(self._caller.more_room)

    def half_close(self) -> None:
        self.take(None)

    def cancel(self) -> None:
        self._inside(self._cancel)

    def more_room(self) -> None:
        self._inside(self._more_room)

    def _inside(self, what: Callable[..., object], *args: object) -> None:
        if not self._process.dead:
            self._process.call(what, *args)

    # inside

    def _begin(self, data: bytes | None) -> None:
        if self._over:
            return
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._serve(data), name=self._method)

    def _more_room(self) -> None:
        self._room += told_every(self.channel.window)
        self._has_room.ring()

    def _cancel(self) -> None:
        self._over = True
        if self._task is not None:
            self._task.cancel()

    async def _serve(self, data: bytes | None) -> None:
        context = ServerContext(self, self._ends_us)
        code, details, trailing = grpc.StatusCode.OK, "", ()
        try:
            self._handler = await self._door.handler(self._method)
            await self._answer(context, data)
        except Aborted as ended:
            code, details, trailing = ended.code, ended.details, ended.trailing or ()
        except asyncio.CancelledError:
            code, details = grpc.StatusCode.CANCELLED, "cancelled at the server"
        except Exception as error:
            code, details = grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}"
            if not self._process.dead:
                self._process.errors.append((self._method, error))
        self._over = True
        context.ended()
        if not self._process.dead:
            self._down.send(self._caller.take_end, code, details, trailing)

    async def _answer(self, context: ServerContext, data: bytes | None) -> None:
        handler = self._handler
        if handler.request_streaming:
            request: Any = context.requests()
        else:
            request = handler.request_deserializer(data or b"")
        serve = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        answer = serve(request, context)
        if inspect.isasyncgen(answer):
            async for response in answer:
                await self.send(response)
        elif (response := await answer) is not None:
            await self.send(response)

    async def next_request(self) -> Any:
        while not self._requests:
            await self._arrived.rung()
        data = self._requests[0]
        if data is None:
            return grpc.aio.EOF
        self._requests.popleft()
        return self._handler.request_deserializer(data)

    async def send(self, response: Message) -> None:
        if self._over:
            raise asyncio.InvalidStateError("RPC already finished.")
        if self._handler.response_streaming:
            while not self._room:
                await self._has_room.rung()
            self._room -= 1
        data = self._handler.response_serializer(response)
        if not self._process.dead:
            self._down.send(self._caller.take, data)

    @property
    def is_over(self) -> bool:
        return self._over


class ServerContext:
    """What a handler may do with its call: the part of grpc.aio.ServicerContext that is used."""

    def __init__(self, call: ServerCall, ends_us: int | None) -> None:
        self._call = call
        self._ends_us = ends_us
        self._callbacks: list[Callable[[Any], None]] = []

    async def read(self) -> Any:
        return await self._call.next_request()

    async def write(self, message: Message) -> None:
        await self._call.send(message)

    async def requests(self) -> AsyncIterator[Any]:
        while (request := await self._call.next_request()) is not grpc.aio.EOF:
            yield request

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> None:
        raise Aborted(code, details, trailing_metadata)

    async def abort_with_status(self, status: Any) -> None:
        raise Aborted(status.code, status.details, status.trailing_metadata)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def ended(self) -> None:
        for callback in self._callbacks:
            callback(self)

    def time_remaining(self) -> float | None:
        if self._ends_us is None:
            return None
        return max(0.0, self._ends_us / 1e6 - asyncio.get_running_loop().time())

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def auth_context(self) -> dict[str, Any]:
        return {}

    def peer(self) -> str:
        return "simulated"

    def set_trailing_metadata(self, metadata: object) -> None:
        """Nobody reads it."""

    def cancelled(self) -> bool:
        return self._call.is_over

    def done(self) -> bool:
        return self._call.is_over
