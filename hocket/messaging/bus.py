"""The message plane: typed protobuf messages over NATS.

Everything latency-critical goes over core NATS (ordered per publisher and subject, at most once);
what has to last goes through JetStream, see `stores`. nats-py has no OpenTelemetry instrumentation,
so trace context travels inside the messages.

House rules: nobody's lifetime hangs on the broker's, so everything here that waits for it has a
short bound and says when it passed; a bug in a handler is a bug of the process, which ends by it
(`Bus.failed`); what others send and cannot be read is counted, never fatal.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import nats
from google.protobuf.message import DecodeError, Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import (
    BadSubjectError,
    MaxPayloadError,
    OutboundBufferLimitError,
    SlowConsumerError,
)
from nats.js import JetStreamContext

from hocket.cancelling import cancellable
from hocket.errors import BrokerUnavailable, HocketError, PeerSilent, Refused
from hocket.messaging.feed import Feed
from hocket.messaging.subjects import Subjects
from hocket.v1 import types_pb2

__all__ = ["BrokerAccess", "Bus", "Feed", "Subjects"]

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

FLUSH_WAIT_S = 1.0
CLOSE_WAIT_S = 1.0
_API_WAIT_S = 5.0  # for an answer of JetStream
_RECONNECT_WAIT_S: Any = 0.1  # nats-py takes fractions, though it says int
_PENDING_MESSAGES_MAX = 65_536  # per subscription; beyond it nats-py drops and tells error_cb
_PENDING_BYTES_MAX = 8 << 20  # written here and not taken by the broker; beyond it we drop
_FLUSHES_MAX = 16  # under way at once
_FLUSH_GIVEN_UP_S: Any = 24 * 3600.0
_FAILURE = "Hocket-Failure"  # header of an answer that is a Failure
# A broker that stands still while others of its cluster go on is to be left soon; where there is
# one only, what was written to it is not lost as long as the connection stays.
_PING_EVERY_S = {True: 2, False: 10}


@dataclass(frozen=True)
class BrokerAccess:
    """What a client shows to get in: further keyword options of nats-py's `Client.connect`."""

    options: Mapping[str, Any] = field(default_factory=dict)
    # How JetStream's API is called in an account that has none of its own: it has no consumers.
    api: str = ""


class Bus:
    """One connection to the broker. Create it with `connect`; close it with `close`."""

    def __init__(self, client: Client, api: str = "") -> None:
        """`api`: see `BrokerAccess`."""
        self._client = client
        self.has_consumers = not api
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushes: set[asyncio.Task[bool]] = set()
        self._failure: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._jetstream = client.jetstream(timeout=_API_WAIT_S, **({"prefix": api} if api else {}))
        self.drops = 0  # messages that a slow subscriber or a full buffer lost
        self.undecodable = 0  # messages that were no protobuf of the expected type
        self.refused = 0  # messages whose handler raised a typed error

    @classmethod
    async def connect(
        cls, url: str, name: str, timeout_s: float = 10.0, access: BrokerAccess | None = None
    ) -> Bus:
        """Connects to the first of some URLs (with commas between them) that answers.

        Raises BrokerUnavailable with the URLs when none answers in `timeout_s`.
        """
        urls = [part.strip() for part in url.split(",") if part.strip()]
        await _wait_for_port(url, urls, timeout_s)
        client, access = Client(), access or BrokerAccess()
        bus = cls(client, access.api)
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(
                    urls,
                    name=name,
                    reconnect_time_wait=_RECONNECT_WAIT_S,
                    max_reconnect_attempts=-1,
                    ping_interval=_PING_EVERY_S[len(urls) > 1],
                    pending_size=_PENDING_BYTES_MAX,
                    flush_timeout=FLUSH_WAIT_S,
                    error_cb=bus._on_error,
                    disconnected_cb=bus._on_disconnect,
                    reconnected_cb=bus._on_reconnect,
                    **access.options,
                )
        except (OSError, nats.errors.Error) as error:
            raise BrokerUnavailable(url=url, cause=str(error) or "no answer") from error
        return bus

    @property
    def jetstream(self) -> JetStreamContext:
        """For `stores` and for media only."""
        return self._jetstream

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
        """Largest message that the broker takes, in bytes."""
        return self._client.max_payload

    @property
    def troubles(self) -> dict[str, int]:
        """What went wrong so far, by name."""
        return {
            "dropped messages": self.drops,
            "undecodable messages": self.undecodable,
            "refused messages": self.refused,
        }

    async def failed(self) -> NoReturn:
        """Waits for ever, or raises the bug of a handler: a service's task group owns this wait."""
        await asyncio.shield(self._failure)
        raise AssertionError("a failure is an exception")

    async def publish(self, subject: str, message: Message) -> None:
        """Hands a message to the broker, or to the buffer while it is away.

        A full buffer drops it; so does what the broker would not take, as too large or on a
        subject that is none: counted and logged.
        """
        content = message.SerializeToString()
        try:
            if self._client.pending_data_size + len(content) < _PENDING_BYTES_MAX:
                await self._client.publish(subject, content)
                return
            cause = "the broker does not take them and the buffer is full"
        except (OutboundBufferLimitError, MaxPayloadError, BadSubjectError) as error:
            cause = str(error)
        self.drops += 1
        if _seldom(self.drops):
            what = "dropped %d messages, the last on %s (%d bytes): %s"
            log.warning(what, self.drops, subject[:256], len(content), cause)

    async def subscribe(
        self,
        subject: str,
        kind: type[M],
        handler: Callable[[M], Awaitable[None]],
        *,
        speaker: Callable[[M], str] | None = None,
    ) -> None:
        """Calls `handler` with each message on `subject`, one at a time, in order.

        A typed error that it raises is logged and counted; any other one is a bug: see `failed`.
        With `speaker`, which says whom a message is from, one whose subject ends with another name
        is refused: the broker's permissions are by subject.
        """

        async def on_message(raw: Msg) -> None:
            message = self._decode(kind, raw)
            if message is None:
                return
            try:
                if speaker is not None:
                    _check_speaker(raw.subject, speaker(message))
                await handler(message)
            except HocketError as error:
                self._refuse(raw.subject, error)
            except Exception as bug:
                self._fail(bug)

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
        """Answers requests on `subject`, each in a task of its own: none holds up the next.

        A typed error of the handler, or a message that cannot be read, is answered by a Failure,
        which `request` raises as Refused. Any other error is a bug (see `failed`), and answered.
        """

        async def answer(raw: Msg) -> None:
            message = self._decode(kind, raw)
            if message is None:
                await self._answer_failure(raw, "UNDECODABLE", f"no {kind.__name__}")
                return
            try:
                content = (await handler(message)).SerializeToString()
            except HocketError as error:
                self._refuse(raw.subject, error)
                await self._answer_failure(raw, error.reason, str(error))
            except Exception as bug:
                await self._answer_failure(raw, "INTERNAL", type(bug).__name__)
                raise
            else:
                await self._answer(raw, content)

        async def on_message(raw: Msg) -> None:
            self.own(answer(raw))

        await self._client.subscribe(subject, cb=on_message)

    async def request(self, subject: str, message: Message, kind: type[R], wait_us: int) -> R:
        """Asks and waits up to `wait_us`.

        Raises PeerSilent when nobody listens or answers, Refused when the answer is a Failure.
        """
        try:
            raw = await cancellable(
                self._client.request(subject, message.SerializeToString(), timeout=wait_us / 1e6)
            )
        except (nats.errors.Error, OSError) as error:
            raise PeerSilent(subject=subject, waited_us=wait_us) from error
        if raw.headers and _FAILURE in raw.headers:
            failure = self._decode(types_pb2.Failure, raw) or types_pb2.Failure()
            raise Refused(failure.reason, failure.message, failure.retry_after_us)
        answer = self._decode(kind, raw)
        if answer is None:
            raise Refused("UNDECODABLE", f"the answer on {subject} is no {kind.__name__}")
        return answer

    async def inbox(self, limit: int = 4096) -> tuple[str, Feed[Msg]]:
        """A subject of this connection's own, and what comes on it. What is not taken waits here
        and then in nats-py, which drops beyond its bound.
        """
        subject = self._client.new_inbox()
        feed: Feed[Msg] = Feed(limit)
        feed.attach(
            await self._client.subscribe(
                subject, cb=feed.offer, pending_msgs_limit=_PENDING_MESSAGES_MAX
            )
        )
        return subject, feed

    async def flush(self, wait_s: float = FLUSH_WAIT_S) -> bool:
        """True once the broker has seen everything sent from here, and we what it had for us;
        False when it did not say so within `wait_s`: it is away or stands still.
        """
        if not self._client.is_connected or len(self._flushes) >= _FLUSHES_MAX:
            return False
        # Never cancelled: an answer to a ping that was given up ends nats-py's reading for good.
        trip = asyncio.get_running_loop().create_task(self._round_trip())
        self._flushes.add(trip)
        trip.add_done_callback(self._flushes.discard)
        done, _ = await asyncio.wait({trip}, timeout=wait_s)
        return bool(done) and not trip.cancelled() and trip.result() and self.connected

    async def close(self) -> None:
        """Ends the connection, within a second or so even where the broker stands still."""
        tasks = (*self._tasks, *self._flushes)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._failure.cancel()
        if not self._client.is_closed:
            with suppress(OSError, nats.errors.Error):  # one that is gone takes no goodbye
                async with asyncio.timeout(CLOSE_WAIT_S):
                    await self._client.close()

    def own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs work that ends with this connection at the latest; its errors are bugs."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)

    def _fail(self, bug: Exception) -> None:
        log.error("a bus handler failed", exc_info=bug)
        if not self._failure.done():
            self._failure.set_exception(bug)
            self._failure.exception()  # seen: whoever waits for it gets it all the same

    def _refuse(self, subject: str, error: HocketError) -> None:
        self.refused += 1
        if _seldom(self.refused):
            log.warning("refused a message on %s (%d so far): %s", subject, self.refused, error)

    async def _answer(
        self, raw: Msg, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        if raw.reply:
            with suppress(nats.errors.Error):  # then the asker's time runs out
                await self._client.publish(raw.reply, content, headers=headers)

    async def _answer_failure(self, raw: Msg, reason: str, message: str) -> None:
        failure = types_pb2.Failure(reason=reason, message=message)
        await self._answer(raw, failure.SerializeToString(), {_FAILURE: reason})

    async def _round_trip(self) -> bool:
        try:
            await self._client.flush(timeout=_FLUSH_GIVEN_UP_S)
        except (nats.errors.Error, OSError):
            return False
        return True

    def _decode(self, kind: type[M], raw: Msg) -> M | None:
        try:
            return kind.FromString(raw.data)
        except DecodeError:
            self.undecodable += 1
            if _seldom(self.undecodable):
                what = "dropped an undecodable message on %s (%d so far)"
                log.warning(what, raw.subject, self.undecodable)
            return None

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, SlowConsumerError):
            self.drops += 1
            if not _seldom(self.drops):
                return
        # Each failed try to reconnect is no news; the loss itself was told.
        quiet = isinstance(error, OSError | TimeoutError | nats.errors.TimeoutError)
        log.log(logging.DEBUG if quiet else logging.WARNING, "broker: %s", error)

    async def _on_disconnect(self) -> None:
        if not self._client.is_closed:
            log.warning("broker connection lost; reconnecting")

    async def _on_reconnect(self) -> None:
        for trip in tuple(self._flushes):  # their pings went with the old connection
            trip.cancel()
        log.info("broker connection restored")


def _check_speaker(subject: str, name: str) -> None:
    if subject.rpartition(".")[2] != name:
        raise Refused("NOT_ITSELF", f"it says that it is from {name[:64]!r}")


def _seldom(count: int) -> bool:
    """Whether the count-th of something is worth a line in the log: 1, 10, 100, …"""
    return count < 1 or str(count).strip("0") == "1"


async def _wait_for_port(given: str, urls: Sequence[str], timeout_s: float) -> None:
    # nats-py waits seconds and logs a traceback when the server is not up yet; a probe is quicker
    # and quiet.
    cause = "no answer"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                for url in urls:
                    parts = urlsplit(url if "//" in url else f"nats://{url}")
                    try:
                        _, writer = await asyncio.open_connection(
                            parts.hostname or "127.0.0.1", parts.port or 4222
                        )
                    except OSError as error:
                        cause = str(error)
                    else:
                        writer.close()
                        return
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise BrokerUnavailable(url=given, cause=cause) from error
