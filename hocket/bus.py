"""The message plane: typed protobuf messages over NATS, and its subjects.

Everything latency-critical goes over core NATS (ordered per publisher and subject, at most once);
durable facts go through JetStream (`Bus.jetstream`). No user text ever stands in a subject. nats-py
has no OpenTelemetry instrumentation, so trace context travels inside the messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import nats
from google.protobuf.message import DecodeError, Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import OutboundBufferLimitError, SlowConsumerError
from nats.js import JetStreamContext

from hocket.errors import BrokerUnavailable, PeerSilent

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

_RECONNECT_WAIT_S: Any = 0.1  # nats-py takes fractions, though it says int
_PENDING_MESSAGES_MAX = 65_536  # per subscription; beyond it nats-py drops and tells error_cb


@dataclass(frozen=True)
class Subjects:
    """Subject names of one cluster."""

    cluster: str

    def assign(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.assign.{worker}"

    def truncate(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.truncate.{worker}"

    def report(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.report.{worker}"

    def heartbeat(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.heartbeat.{worker}"

    def latent(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.latent.{worker}"

    def event(self, request: str) -> str:
        return f"hocket.v1.{self.cluster}.event.{request}"

    def journal(self, entry: str) -> str:
        return f"hocket.v1.{self.cluster}.journal.{entry}"

    @property
    def journal_stream(self) -> str:
        return f"hocket-{self.cluster}-journal"

    @property
    def media_bucket(self) -> str:
        return f"hocket-{self.cluster}-media"

    @property
    def latency_bucket(self) -> str:
        return f"hocket-{self.cluster}-latencies"

    @property
    def leader_bucket(self) -> str:
        return f"hocket-{self.cluster}-leader"


class Bus:
    """One connection to the broker. Create it with `connect`; close it with `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()
        self.drops = 0  # messages that a slow subscriber lost
        self.undecodable = 0  # messages that were no protobuf of the expected type

    @classmethod
    async def connect(cls, url: str, name: str, timeout_s: float = 10.0) -> Bus:
        """Connects; raises BrokerUnavailable with the URL when none answers in `timeout_s`."""
        await _wait_for_port(url, timeout_s)
        client = Client()
        bus = cls(client)
        try:
            await client.connect(
                url,
                name=name,
                reconnect_time_wait=_RECONNECT_WAIT_S,
                max_reconnect_attempts=-1,
                error_cb=bus._on_error,
                disconnected_cb=bus._on_disconnect,
                reconnected_cb=bus._on_reconnect,
            )
        except (OSError, nats.errors.Error) as error:
            raise BrokerUnavailable(url=url, cause=str(error)) from error
        return bus

    @property
    def jetstream(self) -> JetStreamContext:
        return self._client.jetstream(timeout=10.0)

    @property
    def connected(self) -> bool:
        """Whether there is a connection; a broker that stands still keeps one for a while."""
        return bool(self._client.is_connected)

    @property
    def messages(self) -> int:
        """Messages sent and received so far."""
        return int(self._client.stats["in_msgs"]) + int(self._client.stats["out_msgs"])

    @property
    def payload_max(self) -> int:
        return self._client.max_payload

    async def publish(self, subject: str, message: Message) -> None:
        """Hands a message to the broker, or to the buffer while it is away; a full one drops it."""
        try:
            await self._client.publish(subject, message.SerializeToString())
        except OutboundBufferLimitError:
            self.drops += 1
            log.warning("the broker is away and the buffer full: dropped a message on %s", subject)

    async def subscribe(
        self, subject: str, kind: type[M], handler: Callable[[M], Awaitable[None]]
    ) -> None:
        """Calls `handler` with each message on `subject`, one at a time, in order."""

        async def on_message(raw: Msg) -> None:
            message = self._decode(kind, raw)
            if message is not None:
                await handler(message)

        await self._client.subscribe(
            subject, cb=on_message, pending_msgs_limit=_PENDING_MESSAGES_MAX
        )

    async def follow(self, subject: str, kind: type[M], limit: int = 4096) -> Feed[M]:
        """Subscribes, and hands the messages out by a bounded queue; close the feed when done."""
        feed: Feed[M] = Feed(limit)

        async def on_message(raw: Msg) -> None:
            message = self._decode(kind, raw)
            if message is not None:
                feed.put(message)

        feed.attach(await self._client.subscribe(subject, cb=on_message))
        return feed

    async def serve(
        self, subject: str, kind: type[M], handler: Callable[[M], Awaitable[Message]]
    ) -> None:
        """Answers requests on `subject`, each in a task of its own: none holds up the next."""

        async def answer(raw: Msg) -> None:
            message = self._decode(kind, raw)
            if message is not None:
                await raw.respond((await handler(message)).SerializeToString())

        async def on_message(raw: Msg) -> None:
            self._own(answer(raw))

        await self._client.subscribe(subject, cb=on_message)

    async def request(self, subject: str, message: Message, kind: type[R], wait_us: int) -> R:
        """Asks and waits up to `wait_us`; raises PeerSilent when nobody listens or answers."""
        try:
            raw = await self._client.request(
                subject, message.SerializeToString(), timeout=wait_us / 1e6
            )
        except (nats.errors.Error, OSError) as error:
            raise PeerSilent(subject=subject, waited_us=wait_us) from error
        return kind.FromString(raw.data)

    async def flush(self) -> None:
        """Returns when the broker has seen everything sent from here, and we what it had for us."""
        await self._client.flush()

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._client.is_closed:
            with suppress(OSError):  # a broker that is gone takes no goodbye
                await self._client.close()

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a bus handler failed", exc_info=error)

    def _decode(self, kind: type[M], raw: Msg) -> M | None:
        try:
            return kind.FromString(raw.data)
        except DecodeError:
            self.undecodable += 1
            log.warning("dropped an undecodable message on %s", raw.subject)
            return None

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, SlowConsumerError):
            self.drops += 1
        # Each failed try to reconnect is no news; the loss itself was told.
        log.log(
            logging.DEBUG if isinstance(error, OSError) else logging.WARNING, "broker: %s", error
        )

    async def _on_disconnect(self) -> None:
        if not self._client.is_closed:
            log.warning("broker connection lost; reconnecting")

    async def _on_reconnect(self) -> None:
        log.info("broker connection restored")


class Feed(Generic[M]):
    """Messages of one subscription behind a bounded queue.

    When it is full the oldest message gives way and is counted: the last one says how it ended.
    """

    def __init__(self, limit: int) -> None:
        self._queue: asyncio.Queue[M] = asyncio.Queue(limit)
        self._subscription: Subscription | None = None
        self.drops = 0

    def attach(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def put(self, message: M) -> None:
        if self._queue.full():
            self._queue.get_nowait()
            self.drops += 1
        self._queue.put_nowait(message)

    async def next(self) -> M:
        return await self._queue.get()

    @property
    def pending(self) -> int:
        """Messages that have come and were not taken yet."""
        return self._queue.qsize()

    async def close(self) -> None:
        if self._subscription is not None:
            with suppress(nats.errors.Error):
                await self._subscription.unsubscribe()
            self._subscription = None


async def _wait_for_port(url: str, timeout_s: float) -> None:
    # nats-py waits seconds and logs a traceback when the server is not up yet; a probe is quicker
    # and quiet.
    parts = urlsplit(url if "//" in url else f"nats://{url}")
    host, port = parts.hostname or "127.0.0.1", parts.port or 4222
    cause = "no answer"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, port)
                    break
                except OSError as error:
                    cause = str(error)
                    await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise BrokerUnavailable(url=url, cause=cause) from error
    writer.close()
