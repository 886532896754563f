"""The part of a NATS client that `hocket.messaging.bus.Bus` uses, over a simulated broker.

It keeps nats-py's manners: one callback at a time for each subscription, a bounded backlog that
drops and says so, a buffer while the broker is away, reconnection for ever, requests and flushes
that run into their time-outs, and handlers whose exceptions end up in `error_cb`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import nats.errors

from ..loop import SimulatedProcess
from ..waits import Bell
from .broker import DELIVERY, INBOX, Broker, Connection, Interest, Message

_RETRY_S = 0.1
_BUFFER_BYTES_MAX = 2 << 20  # of what is sent while the broker is away
Callback = Callable[["Received"], Awaitable[None]]
AtBroker = Callable[..., None]  # of the connection that it comes over, and what more there is


class Received:
    """A message as a handler sees it."""

    __slots__ = ("_client", "data", "headers", "reply", "subject")

    def __init__(self, client: Client, message: Message) -> None:
        self._client = client
        self.subject, self.data, self.reply, _, _, self.headers = message

    async def respond(self, data: bytes) -> None:
        await self._client.publish(self.reply, data)


class Subscription:
    """Hands messages to one callback, one at a time; without a callback, to `next_msg`."""

    def __init__(
        self, client: Client, subject: str, callback: Callback | None, pending_max: int
    ) -> None:
        self.subject = subject
        self.number = 0  # the broker's, of the present connection
        self._client = client
        self._pending_max = pending_max
        self._backlog: deque[Received] = deque()
        self._arrived = Bell(client.process.loop)
        self._task = None
        if callback is not None:
            self._task = asyncio.get_running_loop().create_task(self._serve(callback))

    @property
    def pending_msgs(self) -> int:
        return len(self._backlog)

    def push(self, message: Message) -> None:
        """Outside of the process, which reads it when it runs."""
        self._client.stats["in_msgs"] += 1
        if len(self._backlog) >= self._pending_max:
            this: Any = self
            error = nats.errors.SlowConsumerError(self.subject, "", self.number, this)
            self._client.process.call(self._client.tell_error, error)
            return
        self._backlog.append(Received(self._client, message))
        self._arrived.ring()

    async def next_msg(self, timeout: float | None = 1.0) -> Received:
        try:
            async with asyncio.timeout(timeout):
                return await self._next()
        except TimeoutError:
            raise nats.errors.TimeoutError from None

    async def unsubscribe(self, limit: int = 0) -> None:
        self._client.forget(self)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def _next(self) -> Received:
        while not self._backlog:
            await self._arrived.rung()
        return self._backlog.popleft()

    async def _serve(self, callback: Callback) -> None:
        backlog = self._backlog
        while True:
            while not backlog:
                await self._arrived.rung()
            try:
                await callback(backlog.popleft())
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._client.tell_error(error)


class Client:
    """One process's connection. Its broker may go away and come back; it follows."""

    def __init__(self, broker: Broker, process: SimulatedProcess, name: str) -> None:
        self.name = name
        self.process = process
        self.broker = broker
        self.max_payload = 1 << 20
        self.stats = {"in_msgs": 0, "out_msgs": 0}
        self.is_closed = False
        # What its `jetstream` gives, by a time-out in seconds (see jetstream.py).
        self.jetstream_of: Callable[[Client, float], object] = _no_jetstream
        self.barred = False  # the network lets no new connection through
        self.subscriptions: list[Subscription] = []
        self.connection: Connection | None = None
        self._buffer: list[tuple[AtBroker, tuple[Any, ...]]] = []
        self._buffered = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._options: dict[str, Any] = {}
        self._background: set[asyncio.Task[None]] = set()
        process.at_death.append(self._die)

    # nats-py's surface

    async def connect(self, servers: object = "", **options: Any) -> None:
        self._options = options
        await self._attach_in_the_end()

    @property
    def is_connected(self) -> bool:
        return self.connection is not None

    @property
    def pending_data_size(self) -> int:
        """Bytes that wait for the broker."""
        return self._buffered

    def new_inbox(self) -> str:
        self._asked += 1
        return f"{DELIVERY}{self.name}.{self._asked}"

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._check_open()
        if len(payload) > self.max_payload:
            raise nats.errors.MaxPayloadError
        self.stats["out_msgs"] += 1
        message = Message(subject, payload, reply, headers=headers)
        self._send(len(payload) + len(subject), self._publish, message)

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: Callback | None = None,
        pending_msgs_limit: int = 512 * 1024,
        pending_bytes_limit: int = 0,
    ) -> Subscription:
        self._check_open()
        subscription = Subscription(self, subject, cb, pending_msgs_limit)
        self.subscriptions.append(subscription)
        if self.connection is not None:
            self._send(0, self._tell_interest, subscription)
        return subscription

    async def request(
        self, subject: str, payload: bytes = b"", timeout: float = 0.5, headers: object = None
    ) -> Received:
        self._check_open()
        number, answer = self._expect()

        def ask(connection: Connection) -> None:
            message = Message(subject, payload, f"{INBOX}{self.name}.{number}")
            if not self.broker.publish(message, connection):
                error = nats.errors.NoRespondersError
                connection.down.send(self._answered, number, None, error)

        self._send(len(payload), ask)
        message = await self.answer(number, answer, timeout)
        return Received(self, message)

    async def flush(self, timeout: float = 10) -> None:
        self._check_open()
        number, answer = self._expect()

        def ping(connection: Connection) -> None:
            connection.down.send(self._answered, number, True)

        self._send(0, ping)
        try:
            await self.answer(number, answer, timeout)
        except nats.errors.TimeoutError:
            raise nats.errors.FlushTimeoutError from None

    async def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        for subscription in tuple(self.subscriptions):
            await subscription.unsubscribe()
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.on_reset = _nothing
            connection.up.send(self.broker.reset, connection)
        for task in tuple(self._background):
            task.cancel()

    async def drain(self) -> None:
        await self.close()

    def jetstream(self, timeout: float = 5.0, **_: object) -> object:
        return self.jetstream_of(self, timeout)

    # for the simulated stores

    async def ask(self, work: Callable[[], Any], timeout_s: float, *, stores: bool = False) -> Any:
        """Lets the broker do something and returns (or raises) what came of it; `stores` says that
        the answer may be lost although it was done. Raises nats.errors.TimeoutError.
        """
        self._check_open()
        number, answer = self._expect()

        def at_broker(connection: Connection) -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as raised:
                error = raised
            lost = stores and self.broker.rng.random() < self.broker.weather.lost_answer
            if not lost:
                connection.down.send(self._answered, number, result, error)

        self._send(64, at_broker)
        return await self.answer(number, answer, timeout_s)

    async def answer(self, number: int, answer: asyncio.Future[Any], timeout_s: float) -> Any:
        timer = self.process.loop.call_later(timeout_s, self._run_out, number)
        try:
            result = await answer
        finally:
            timer.cancel()
            in_time = self._waiting.pop(number, None) is not None
        if not in_time:
            raise nats.errors.TimeoutError
        return result

    def tell_error(self, error: Exception) -> None:
        tell = self._options.get("error_cb")
        if tell is not None:
            self._own(tell(error))

    def forget(self, subscription: Subscription) -> None:
        if subscription in self.subscriptions:
            self.subscriptions.remove(subscription)
            if self.connection is not None:  # its number is known once it has come there
                self._send(0, self._drop_interest, subscription)

    # what the world does to it

    def cut(self) -> None:
        """The connection breaks, and no new one comes through while `barred`."""
        if self.connection is not None:
            self.broker.reset(self.connection)

    # ------------------------------------------------------------------------------------------

    def _expect(self) -> tuple[int, asyncio.Future[Any]]:
        self._asked += 1
        answer = self.process.loop.create_future()
        self._waiting[self._asked] = answer
        return self._asked, answer

    def _answered(self, number: int, result: Any, error: Any = None) -> None:
        """Outside of the process: what waits in it goes on when the process runs."""
        answer = self._waiting.get(number)
        if answer is not None:
            _settle(answer, result, error)

    def _run_out(self, number: int) -> None:
        """Nobody waits for that answer any more."""
        _settle(self._waiting.pop(number), None, None)

    def _send(self, size: int, at_broker: AtBroker, *args: Any) -> None:
        if self.process.dead:
            raise asyncio.CancelledError
        connection = self.connection
        if connection is None:
            self._buffered += size
            if self._buffered > _BUFFER_BYTES_MAX:
                self._buffered -= size
                raise nats.errors.OutboundBufferLimitError
            self._buffer.append((at_broker, args))
        else:
            connection.up.send(at_broker, connection, *args)

    async def _attach_in_the_end(self) -> None:
        while not self.is_closed and not self._attach():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(_RETRY_S)

    def _attach(self) -> bool:
        if self.barred or self.process.dead:
            return False
        connection = self.broker.connect(self.name)
        if connection is None:
            return False
        self.connection = connection
        connection.on_reset = self._on_reset
        inbox = Interest(f"{INBOX}{self.name}", connection, self._take_answer)
        connection.up.send(self.broker.subscribe, inbox)
        for subscription in self.subscriptions:
            self._send(0, self._tell_interest, subscription)
        buffer, self._buffer, self._buffered = self._buffer, [], 0
        for at_broker, args in buffer:
            self._send(0, at_broker, *args)
        return True

    def _publish(self, connection: Connection, message: Message) -> None:
        self.broker.publish(message, connection)

    def _drop_interest(self, connection: Connection, subscription: Subscription) -> None:
        self.broker.unsubscribe(subscription.number)

    def _tell_interest(self, connection: Connection, subscription: Subscription) -> None:
        if connection is not self.connection or subscription not in self.subscriptions:
            return

        interest = Interest(subscription.subject, connection, subscription.push)
        subscription.number = self.broker.subscribe(interest)

    def _take_answer(self, message: Message) -> None:
        self.stats["in_msgs"] += 1
        self._answered(int(message.subject.rpartition(".")[2]), message)

    def _on_reset(self) -> None:
        """The connection is gone; the process hears of it when it runs."""
        self.connection = None
        if not self.process.dead and not self.is_closed:
            self.process.call(self._lost)

    def _lost(self) -> None:
        tell = self._options.get("disconnected_cb")
        if tell is not None:
            self._own(tell())
        self._own(self._reconnect())

    async def _reconnect(self) -> None:
        await self._attach_in_the_end()
        tell = self._options.get("reconnected_cb")
        if tell is not None and not self.is_closed:
            await tell()

    def _own(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _die(self) -> None:
        if self.connection is not None:
            self.broker.reset(self.connection)
        self.is_closed = True

    def _check_open(self) -> None:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError


def _settle(answer: asyncio.Future[Any], result: Any, error: Any) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)


def _nothing() -> None:
    """Nobody minds."""


def _no_jetstream(client: Client, timeout_s: float) -> object:
    raise NotImplementedError
