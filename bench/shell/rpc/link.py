"""gRPC between simulated processes: the stubs' and the servicers' surface, over wires that break.

A channel has one wire up and one down, as an HTTP/2 connection has: what is sent first arrives
first. It breaks when a side dies, when it is cut, or after `_KEEPALIVE_US` of silence on a held
wire; a call under way then ends with UNAVAILABLE at its caller and is cancelled at its server.
Before that, a partition is what it is in life: silence.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import Message

from ..loop import SimulatedLoop, SimulatedProcess
from ..waits import Bell
from ..wire import Weather, Wire
from .served import ServedAddress, ServerCall, told_every

_KEEPALIVE_US = 15_000_000
_RETRY_S = 0.1
_WINDOW = 256  # messages that a stream sends ahead of its reader
WINDOW = "hocket.simulated.window"  # channel option: see `Channel.window`
OK = grpc.StatusCode.OK
BROKEN = ("connection lost", "failed to connect")  # details of what never reached a server's code


class Network:
    """Who can be reached at which address, and every channel there is."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random, weather: Weather) -> None:
        self.loop, self.rng, self.weather = loop, rng, weather
        self.doors: dict[str, ServedAddress] = {}
        self.channels: list[Channel] = []
        self.apart: set[frozenset[str]] = set()  # pairs of processes that cannot reach each other
        self._port = 40_000

    def port(self) -> int:
        self._port += 1
        return self._port

    def listen(self, door: ServedAddress) -> None:
        self.doors[door.address] = door
        door.process.at_death.append(lambda: self.close(door))

    def close(self, door: ServedAddress) -> None:
        """Closes a door and breaks what goes through it."""
        if self.doors.get(door.address) is door:
            del self.doors[door.address]
        for channel in [c for c in self.channels if c.door is door]:
            channel.break_off()

    def part(self, one: str, other: str) -> None:
        """Two processes stop hearing each other."""
        self.apart.add(frozenset((one, other)))
        for channel in self._between(one, other):
            channel.hold()

    def join(self, one: str, other: str) -> None:
        self.apart.discard(frozenset((one, other)))
        for channel in self._between(one, other):
            channel.release()

    def cut(self, one: str, other: str) -> None:
        """Breaks the connections between two processes; new ones come through."""
        for channel in self._between(one, other):
            channel.break_off()

    def _between(self, one: str, other: str) -> list[Channel]:
        names = {one, other}
        return [
            c
            for c in self.channels
            if c.door is not None and {c.process.name, c.door.process.name} == names
        ]


class Channel:
    """A process's connection to an address; made anew whenever it broke."""

    def __init__(
        self, network: Network, process: SimulatedProcess, address: str, window: int | None = None
    ) -> None:
        self.network, self.process, self.address = network, process, address
        self.window = window or _WINDOW  # responses that come ahead of their reader
        self.door: ServedAddress | None = None
        self.calls: list[Call] = []
        self.closed = False
        self.up = Wire(network.loop, network.rng, network.weather)
        self.down = Wire(network.loop, network.rng, network.weather)
        self._held = False
        network.channels.append(self)
        process.at_death.append(self._die)

    def unary_unary(self, method: str, *codecs: Any, **more: Any) -> Callable[..., Call]:
        return self._method(method, *codecs, **more)

    unary_stream = stream_unary = stream_stream = unary_unary

    def _method(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: object
    ) -> Callable[..., Call]:
        def start(
            request: Any = None,
            timeout: float | None = None,
            metadata: object = None,
            wait_for_ready: bool | None = None,
            **_: object,
        ) -> Call:
            codec = (request_serializer, response_deserializer)
            return Call(self, method, codec, request, timeout, bool(wait_for_ready))

        return start

    async def close(self, grace: float | None = None) -> None:
        self.closed = True
        for call in tuple(self.calls):
            call.cancel()
        if self in self.network.channels:
            self.network.channels.remove(self)

    def reach(self) -> bool:
        """Connects where needed; whether that worked."""
        door = self.network.doors.get(self.address)
        if self.closed:
            raise grpc.aio.UsageError("Channel is closed.")
        if self.door is not None:
            return True
        pair = frozenset((self.process.name, door.process.name)) if door is not None else None
        if door is None or door.process.dead or pair in self.network.apart:
            return False
        self.door = door
        return True

    def hold(self) -> None:
        if not self._held:
            self._held = True
            self.up.hold()
            self.down.hold()
            since_us = self.network.loop.now_us
            self.network.loop.at_us(since_us + _KEEPALIVE_US, self._keepalive, self.door)

    def release(self) -> None:
        if self._held:
            self._held = False
            self.up.release()
            self.down.release()

    def break_off(self) -> None:
        """The connection is gone: both sides hear of it."""
        self.release()
        self.up.cut()
        self.down.cut()
        self.door = None
        for call in tuple(self.calls):
            call.broken()

    def _keepalive(self, door: ServedAddress | None) -> None:
        if self._held and self.door is door:
            self.break_off()

    def _die(self) -> None:
        self.break_off()
        if self in self.network.channels:
            self.network.channels.remove(self)


class Call:
    """One call as its caller sees it: awaitable, or a stream to read and write."""

    def __init__(
        self,
        channel: Channel,
        method: str,
        codec: tuple[Any, Any],
        request: Any,
        timeout_s: float | None,
        wait_for_ready: bool,
    ) -> None:
        self.channel, self.method = channel, method
        self._serialize, self._deserialize = codec
        loop = asyncio.get_running_loop()
        self._responses: deque[bytes] = deque()
        self._changed = Bell(channel.network.loop)
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        self._room = asyncio.Semaphore(_WINDOW)
        self._taken = 0
        self.server: ServerCall | None = None
        self._connected: asyncio.Future[None] = loop.create_future()
        self._ends_us = None
        if timeout_s is not None:
            self._ends_us = channel.network.loop.now_us + round(timeout_s * 1e6)
            self._timer = loop.call_later(timeout_s, self._run_out)
        channel.calls.append(self)
        self._feeding: asyncio.Task[None] | None = None
        self._starting = loop.create_task(self._start(request, wait_for_ready))

    # what callers use

    def __await__(self) -> Any:
        return self._only().__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._all()

    async def read(self) -> Any:
        """The next response; grpc.aio.EOF behind the last. A cancelled read cancels the call."""
        try:
            while not self._responses and self._status is None:
                await self._changed.rung()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._responses:
            data = self._responses.popleft()
            self._taken += 1
            every = told_every(self.channel.window)
            if self.server is not None and self._taken % every == 0:
                self.channel.up.send(self.server.more_room)
            return self._deserialize(data)
        self._raise_unless_ok()
        return grpc.aio.EOF

    async def write(self, message: Message) -> None:
        await self.wait_for_connection()
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        await self._room.acquire()
        data, server = self._serialize(message), self.server
        if server is None:  # broken; the process has not heard of it yet
            await self.code()
            self._raise_unless_ok()
        else:
            self.channel.up.send(server.take, data)

    async def done_writing(self) -> None:
        await self.wait_for_connection()
        if not self.done() and (server := self.server) is not None:
            self.channel.up.send(server.half_close)

    async def wait_for_connection(self) -> None:
        await asyncio.shield(self._connected)
        self._raise_unless_ok()

    def cancel(self) -> bool:
        if self.done():
            return False
        server = self.server
        if server is not None and self.channel.door is not None:
            self.channel.up.send(server.cancel)
        self._end(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", None)
        return True

    def cancelled(self) -> bool:
        return self._status is not None and self._status[0] is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self._status is not None

    async def code(self) -> grpc.StatusCode:
        while self._status is None:
            await self._changed.rung()
        return self._status[0]

    # what the network does; outside of the process

    def broken(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.cancel()
        self._later(self._end, grpc.StatusCode.UNAVAILABLE, BROKEN[0], None)

    def take(self, data: bytes) -> None:
        if not self.done():
            self._responses.append(data)
            self._changed.ring()

    def take_end(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        self._later(self._end, code, details, trailing)

    def more_room(self) -> None:
        for _ in range(told_every(_WINDOW)):
            self._later(self._room.release)

    # ------------------------------------------------------------------------------------------

    def _later(self, what: Callable[..., object], *args: object) -> None:
        if not self.channel.process.dead:
            self.channel.process.call(what, *args)

    async def _start(self, request: Any, wait_for_ready: bool) -> None:
        try:
            while not self.done() and not self.channel.reach():
                if not wait_for_ready:
                    self._end(grpc.StatusCode.UNAVAILABLE, BROKEN[1], None)
                    return
                await asyncio.sleep(_RETRY_S)
        except grpc.aio.UsageError:
            self._end(grpc.StatusCode.CANCELLED, "channel closed", None)
        if self.done():
            return
        door = self.channel.door
        assert door is not None
        data = self._serialize(request) if isinstance(request, Message) else None
        down = self.channel.down
        self.server = server = ServerCall(self, door, self.method, down, self._ends_us)
        self.channel.up.send(server.begin, data)
        self._connected.set_result(None)
        if data is None and request is not None:
            loop = asyncio.get_running_loop()
            self._feeding = loop.create_task(self._feed(request))

    async def _feed(self, requests: Any) -> None:
        try:
            if isinstance(requests, Iterable):
                for message in requests:
                    await self.write(message)
            else:
                async for message in requests:
                    await self.write(message)
            await self.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader hears of it

    async def _only(self) -> Any:
        first = await self.read()
        self._raise_unless_ok()
        return first

    async def _all(self) -> AsyncIterator[Any]:
        while (response := await self.read()) is not grpc.aio.EOF:
            yield response

    def _run_out(self) -> None:
        if not self.done() and self.server is not None and self.channel.door is not None:
            self.channel.up.send(self.server.cancel)
        self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", None)

    def _end(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        if self.done():
            return
        self._status = (code, details, trailing)
        if self in self.channel.calls:
            self.channel.calls.remove(self)
        if not self._connected.done():
            self._connected.set_result(None)
        self._changed.ring()
        if self._ends_us is not None:
            self._timer.cancel()
        if self._feeding is not None:
            self._feeding.cancel()
        if self._room.locked():
            self._room.release()

    def _raise_unless_ok(self) -> None:
        if self._status is None or self._status[0] is OK:
            return
        code, details, trailing = self._status
        if code is grpc.StatusCode.CANCELLED and trailing is None:
            raise asyncio.CancelledError
        metadata = grpc.aio.Metadata(*(trailing or ()))
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details)
