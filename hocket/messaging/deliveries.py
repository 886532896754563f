"""What a stream delivers to one reader: in order, without gaps, or broken.

An ephemeral push consumer with heartbeats. nats-py's own ordered consumer starts itself anew in the
background; here whoever reads is told (`Broken`) and begins again behind what it has seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime

import nats.errors
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import NotFoundError

from hocket.cancelling import cancellable
from hocket.errors import BrokerUnavailable, HocketError
from hocket.messaging.bus import Bus
from hocket.messaging.feed import Feed

_HEARTBEAT_S = 1.0
_SILENCE_S = 3.0  # without message and heartbeat it is broken
_LAST_DELIVERED = "Nats-Last-Consumer"


@dataclass(frozen=True)
class StreamEntry:
    """One entry of a stream."""

    subject: str
    data: bytes
    sequence: int  # its number in the stream
    unix_us: int  # when the broker stored it, by the broker's clock


@dataclass
class Broken(HocketError):
    """A delivery has a gap or has fallen silent."""

    cause: str

    def __str__(self) -> str:
        return self.cause


class Delivery:
    """One consumer of one stream."""

    def __init__(self, messages: Feed[Msg], pending: int) -> None:
        self._messages = messages
        self._seen = 0
        self._waits_since_s: float | None = None  # whoever reads it; None: nobody waits
        self._watch: asyncio.TimerHandle | None = None  # one for many messages
        self.pending = pending  # entries that matched when it was opened

    @classmethod
    async def open(
        cls, bus: Bus, stream: str, subject: str, *, newest: bool = False, after: int = 0
    ) -> Delivery:
        """Entries on `subject` (empty: all) behind number `after`, or the newest of each subject.
        Raises Broken, also where there is no such stream.
        """
        policy = api.DeliverPolicy.ALL
        if newest:
            policy = api.DeliverPolicy.LAST_PER_SUBJECT
        elif after:
            policy = api.DeliverPolicy.BY_START_SEQUENCE
        try:
            inbox, messages = await bus.inbox()
        except (nats.errors.Error, OSError) as error:
            raise Broken(str(error) or "no answer") from error
        config = api.ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=policy,
            opt_start_seq=after + 1 if policy is api.DeliverPolicy.BY_START_SEQUENCE else None,
            filter_subject=subject or None,
            ack_policy=api.AckPolicy.NONE,
            max_deliver=1,
            idle_heartbeat=_HEARTBEAT_S,
            mem_storage=True,
            num_replicas=1,
        )
        made = None
        try:
            made = await cancellable(bus.jetstream.add_consumer(stream, config))
        except (nats.errors.Error, OSError) as error:
            raise Broken(str(error) or "no answer") from error
        finally:
            if made is None:
                await messages.close()
        return cls(messages, int(made.num_pending or 0))

    async def next(self) -> tuple[StreamEntry, int]:
        """The next entry, and how many more match now. Raises Broken."""
        while True:
            message = await self._next()
            if not message.reply:
                self._beat(message)
                continue
            sequence, delivered, stamp_ns, pending = _numbers(message.reply)
            if delivered != self._seen + 1:
                raise Broken("entries are missing in the delivery")
            self._seen += 1
            return StreamEntry(message.subject, message.data, sequence, stamp_ns // 1000), pending

    async def close(self) -> None:
        """The broker forgets a consumer that nobody listens to."""
        if self._watch is not None:
            self._watch.cancel()
        await self._messages.close()

    async def _next(self) -> Msg:
        if not self._messages.pending:
            loop = asyncio.get_running_loop()
            self._waits_since_s = loop.time()
            if self._watch is None:
                self._watch = loop.call_later(_SILENCE_S, self._look)
        try:
            return await self._messages.next()
        finally:
            self._waits_since_s = None

    def _look(self) -> None:
        """Whether the reader has waited too long by now; else looks again when it will have."""
        self._watch, since_s = None, self._waits_since_s
        if since_s is None or self._messages.pending:
            return
        loop = asyncio.get_running_loop()
        if since_s + _SILENCE_S > loop.time():
            self._watch = loop.call_at(since_s + _SILENCE_S, self._look)
        else:
            self._messages.end(Broken("the delivery fell silent"))

    def _beat(self, message: Msg) -> None:
        told = (message.headers or {}).get(_LAST_DELIVERED)
        if told is not None and int(told) != self._seen:
            raise Broken("entries are missing in the delivery")


def _numbers(reply: str) -> tuple[int, int, int, int]:
    """An entry's number in the stream and in the delivery, its stamp in ns, and how many more
    match: as nats-py's metadata, without its rounding and its cost. Raises Broken.
    """
    parts = reply.split(".")
    first = 5 if len(parts) == 9 else 7  # `$JS.ACK.…`, without a domain or with one
    try:
        sequence, delivered, stamp_ns, pending = map(int, parts[first : first + 4])
    except ValueError as error:
        raise Broken(f"no delivery has a reply such as {reply[:64]!r}") from error
    return sequence, delivered, stamp_ns, pending


async def one_by_one(bus: Bus, stream: str, subject: str, upto: int) -> AsyncIterator[StreamEntry]:
    """Entries up to number `upto`, oldest first, each asked for: where there are no consumers.

    Raises BrokerUnavailable.
    """
    after = 0
    while after < upto:
        try:
            found = await cancellable(
                bus.jetstream.get_msg(stream, seq=after + 1, subject=subject, next=True)
            )
        except NotFoundError:
            return
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable("JetStream", str(error) or "no answer") from error
        after = int(found.seq or upto)
        if after <= upto:
            yield StreamEntry(found.subject or "", found.data or b"", after, unix_us_of(found.time))


def unix_us_of(stamp: datetime | None) -> int:
    """A stamp of the broker's, in µs since 1970."""
    return round(stamp.timestamp() * 1e6) if stamp is not None else 0
