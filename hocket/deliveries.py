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

from hocket.bus import Bus
from hocket.cancelling import cancellable
from hocket.errors import BrokerUnavailable, HocketError
from hocket.feed import Feed

_HEARTBEAT_S = 1.0
_SILENCE_S = 3.0  # without message and heartbeat it is broken
_LAST_DELIVERED = "Nats-Last-Consumer"


@dataclass(frozen=True)
class Entry:
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

    async def next(self) -> tuple[Entry, int]:
        """The next entry, and how many more match now. Raises Broken."""
        while True:
            try:
                async with asyncio.timeout(_SILENCE_S):
                    message = await self._messages.next()
            except TimeoutError as error:
                raise Broken("the delivery fell silent") from error
            if not message.reply:
                self._beat(message)
                continue
            meta = message.metadata
            if meta.sequence.consumer != self._seen + 1:
                raise Broken("entries are missing in the delivery")
            self._seen += 1
            entry = Entry(
                subject=message.subject,
                data=message.data,
                sequence=meta.sequence.stream,
                unix_us=_stamp_ns(message.reply) // 1000,
            )
            return entry, meta.num_pending

    async def close(self) -> None:
        """The broker forgets a consumer that nobody listens to."""
        await self._messages.close()

    def _beat(self, message: Msg) -> None:
        told = (message.headers or {}).get(_LAST_DELIVERED)
        if told is not None and int(told) != self._seen:
            raise Broken("entries are missing in the delivery")


def _stamp_ns(reply: str) -> int:
    """As nats-py's metadata, without its rounding: `$JS.ACK.…`, of 9 tokens or of more."""
    parts = reply.split(".")
    return int(parts[7] if len(parts) == 9 else parts[9])


async def one_by_one(bus: Bus, stream: str, subject: str, upto: int) -> AsyncIterator[Entry]:
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
            yield Entry(found.subject or "", found.data or b"", after, unix_us_of(found.time))


def unix_us_of(stamp: datetime | None) -> int:
    """A stamp of the broker's, in µs since 1970."""
    return round(stamp.timestamp() * 1e6) if stamp is not None else 0
