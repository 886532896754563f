"""Durable places on the broker: a `Log` is one stream, a `LeasedKey` one key that expires.

Everything that lasts goes through these two, so that a simulation can put its own in their place.
Both tell apart what a caller has to tell apart: refused (somebody else wrote), stored, and *not
known* (`OutcomeUnknown`: the broker did not say; it may be stored now or still be on its way).

    append(subject, data, guard=(fence, 7), message_id="7-31")
        stored only if the newest entry on `fence` is number 7; a repeated message id within two
        minutes is stored once and answered with the first one's number
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import nats.errors
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from hocket.cancelling import cancellable
from hocket.errors import BrokerUnavailable, HocketError
from hocket.messaging.bus import Bus
from hocket.messaging.deliveries import Broken, Delivery, StreamEntry, one_by_one, unix_us_of
from hocket.messaging.feed import Feed

_AGAIN_S = 0.2  # between tries to follow a log that cannot be had
_FEED_MAX = 4096
_APPEND_WAIT_S = 2.0
_CELL_WAIT_S = 1.0  # a key is renewed every second or so
_WRONG_SEQUENCE = {10071, 10164}  # JetStream's error codes
_NO_ROOM = {10023, 10047, 10028}  # of the server, when a stream is made
_FULL = {10023, 10047, 10077, 10122}
_OTHER_CONFIG = 10058


@dataclass
class LogMoved(HocketError):
    """An append was refused: somebody else has written since."""

    last: int  # number of the entry that stands where another was expected; 0: none, or not told


@dataclass
class OutcomeUnknown(HocketError):
    """The broker did not say whether it stored an entry."""

    subject: str
    cause: str

    def __str__(self) -> str:
        return f"the broker did not say whether it stored {self.subject}: {self.cause}"


@dataclass
class LogFull(HocketError):
    """An append was refused: the stream has no room."""

    log: str
    cause: str

    def __str__(self) -> str:
        return f"the stream {self.log} is full: {self.cause}"


@dataclass
class EntryTooLarge(HocketError):
    """The entry is larger than the broker's messages may be."""

    subject: str
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes for {self.subject} are more than the broker takes"


@dataclass
class NoRoom(HocketError):
    """The broker has not the space that a stream was to have."""

    log: str
    wanted_bytes: int

    def __str__(self) -> str:
        return f"the broker has no room for {self.wanted_bytes} bytes of the stream {self.log}"


@dataclass(frozen=True)
class AppendCondition:
    """A condition on an append: the newest entry on `subject` is number `sequence` (0: none)."""

    subject: str
    sequence: int


@dataclass(frozen=True)
class LogShape:
    """What a stream is to be."""

    name: str
    subjects: tuple[str, ...]
    bytes_max: int = -1  # reserved on the broker's disk; -1: no bound, nothing reserved
    newest_only: bool = False  # of each subject
    oldest_go: bool = False  # when it is full; else appends are refused
    age_max_s: float = 0.0  # 0: for ever
    keeps: bool = False  # no single entry can be taken out (as in a NATS KV bucket)
    replicas: int = 1  # of a broker that is a cluster


class Log:
    """One stream."""

    def __init__(self, bus: Bus, name: str, wait_s: float = _APPEND_WAIT_S) -> None:
        """`wait_s`: for the answer to an append."""
        self._bus = bus
        self._wait_s = wait_s
        self.name = name

    @classmethod
    async def open(cls, bus: Bus, shape: LogShape) -> Log:
        """Makes the stream, or changes it to this shape.

        Raises NoRoom, and BrokerUnavailable when there is no answer.
        """
        config = api.StreamConfig(
            name=shape.name,
            subjects=list(shape.subjects),
            retention=api.RetentionPolicy.LIMITS,
            max_bytes=shape.bytes_max,
            max_msgs_per_subject=1 if shape.newest_only else -1,
            discard=api.DiscardPolicy.OLD if shape.oldest_go else api.DiscardPolicy.NEW,
            max_age=shape.age_max_s,
            duplicate_window=min(120.0, shape.age_max_s or 120.0),
            allow_msg_ttl=True,
            # What expires leaves a mark for those who watch, only where all of it does.
            subject_delete_marker_ttl=max(1.0, shape.age_max_s) if shape.age_max_s else None,
            deny_delete=shape.keeps,
            allow_rollup_hdrs=True,
            allow_direct=True,
            num_replicas=shape.replicas,
        )
        try:
            try:
                await cancellable(bus.jetstream.add_stream(config))
            except APIError as error:
                if error.err_code != _OTHER_CONFIG:
                    raise
                await cancellable(bus.jetstream.update_stream(config))
        except APIError as error:
            if error.err_code in _NO_ROOM:
                raise NoRoom(shape.name, shape.bytes_max) from error
            raise BrokerUnavailable("JetStream", str(error.description or error)) from error
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable("JetStream", str(error) or "no answer") from error
        return cls(bus, shape.name)

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        after: int | None = None,
        guard: AppendCondition | None = None,
        ttl_s: float = 0.0,
        message_id: str = "",
    ) -> int:
        """Stores an entry and returns its number. Many may be under way at once, in order.

        `after`: only if the newest entry of the whole stream is that one. `ttl_s`: it goes after
        so long, in whole seconds. Raises LogMoved, LogFull, EntryTooLarge (not stored) and
        OutcomeUnknown.
        """
        headers = {api.Header.EXPECTED_STREAM.value: self.name}
        if after is not None:
            headers[api.Header.EXPECTED_LAST_SEQUENCE.value] = str(after)
        if guard is not None:
            headers[api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value] = str(guard.sequence)
            headers[f"{api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value}-Subject"] = guard.subject
        if message_id:
            headers[api.Header.MSG_ID.value] = message_id
        ttl = max(1.0, round(ttl_s)) if ttl_s else None
        try:
            ack = await cancellable(
                self._bus.jetstream.publish(
                    subject, data, self._wait_s, headers=headers, msg_ttl=ttl
                )
            )
        except APIError as error:
            raise self._refusal(subject, error) from error
        except nats.errors.MaxPayloadError as error:
            raise EntryTooLarge(subject, len(data)) from error
        except (nats.errors.Error, OSError) as error:
            raise OutcomeUnknown(subject, str(error) or "no answer") from error
        return int(ack.seq)

    async def newest(self, subject: str) -> StreamEntry | None:
        """The newest entry on a subject. Raises BrokerUnavailable."""
        try:
            found = await cancellable(self._bus.jetstream.get_last_msg(self.name, subject))
        except NotFoundError:
            return None
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable("JetStream", str(error) or "no answer") from error
        return StreamEntry(
            subject=found.subject or subject,
            data=found.data or b"",
            sequence=int(found.seq or 0),
            unix_us=unix_us_of(found.time),
        )

    async def bytes_max(self) -> int | None:
        """The stream's bound; None where there is no stream. Raises BrokerUnavailable."""
        info = await self._info()
        return None if info is None else int(info.config.max_bytes or -1)

    async def room_and_bound(self) -> tuple[int, int] | None:
        """Bytes left, and its bound; None: it has none. Raises BrokerUnavailable."""
        info = await self._info()
        bound = 0 if info is None else info.config.max_bytes or 0
        return (bound - int(info.state.bytes), bound) if info is not None and bound > 0 else None

    async def count(self) -> int:
        """How many entries it holds. Raises BrokerUnavailable."""
        info = await self._info()
        return 0 if info is None else int(info.state.messages)

    async def last_sequence(self) -> int:
        """Number of the newest entry ever; 0 when there is none. Raises BrokerUnavailable."""
        info = await self._info()
        return 0 if info is None else int(info.state.last_seq)

    async def read(self, subject: str, *, history: bool = False) -> AsyncIterator[StreamEntry]:
        """The newest entry of each subject (`history`: all of them), oldest first, up to the newest
        at the call. `subject` may have wildcards. Raises BrokerUnavailable when it breaks off.
        """
        upto = await self.last_sequence()
        if not upto:
            return
        if history and not self._bus.has_consumers:
            async for entry in one_by_one(self._bus, self.name, subject, upto):
                yield entry
            return
        try:
            delivery = await Delivery.open(self._bus, self.name, subject, newest=not history)
        except Broken as error:
            raise BrokerUnavailable("JetStream", str(error)) from error
        try:
            pending = delivery.pending
            while pending:
                entry, pending = await delivery.next()
                if entry.sequence > upto:
                    return
                yield entry
        except Broken as error:
            raise BrokerUnavailable("JetStream", str(error)) from error
        finally:
            await delivery.close()

    async def follow(self, after: int, subject: str = "") -> Feed[StreamEntry]:
        """Everything behind entry number `after`, as it comes, for as long as the feed is open; a
        broker that is away is waited for.
        """
        feed: Feed[StreamEntry] = Feed(_FEED_MAX)
        feed.attach(self._bus.own(self._keep_following(feed, after, subject)))
        return feed

    async def purge(self, subject: str, upto: int = 0) -> None:
        """Drops what stands on a subject, up to an entry's number. Raises BrokerUnavailable."""
        seq = upto + 1 if upto else None
        try:
            await cancellable(self._bus.jetstream.purge_stream(self.name, seq, subject))
        except NotFoundError:
            return
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable("JetStream", str(error) or "no answer") from error

    async def _keep_following(self, feed: Feed[StreamEntry], after: int, subject: str) -> None:
        while True:
            with suppress(Broken, BrokerUnavailable):
                if await self.last_sequence() < after:
                    after = 0  # the broker came back without its store
                delivery = await Delivery.open(self._bus, self.name, subject, after=after)
                try:
                    while True:
                        entry, _ = await delivery.next()
                        await feed.offer(entry)
                        after = entry.sequence
                finally:
                    await delivery.close()
            await asyncio.sleep(_AGAIN_S)

    async def _info(self) -> api.StreamInfo | None:
        try:
            return await cancellable(self._bus.jetstream.stream_info(self.name))
        except NotFoundError:
            return None
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable("JetStream", str(error) or "no answer") from error

    def _refusal(self, subject: str, error: APIError) -> HocketError:
        if error.err_code in _WRONG_SEQUENCE:
            found = re.search(r"\d+$", error.description or "")
            return LogMoved(int(found[0]) if found else 0)
        if error.err_code in _FULL:
            return LogFull(self.name, error.description or "")
        return OutcomeUnknown(subject, str(error.description or error))


class LeasedKey:
    """One key with a value that goes when nobody renews it. Its revisions only ever rise."""

    def __init__(self, bus: Bus, bucket: str, key: str) -> None:
        self._bus = bus
        self._log = Log(bus, f"KV_{bucket}", _CELL_WAIT_S)
        self._subject = f"$KV.{bucket}.{key}"

    @classmethod
    async def open(
        cls, bus: Bus, bucket: str, key: str, ttl_s: float = 0.0, replicas: int = 1
    ) -> LeasedKey:
        """Makes the bucket where needed; 0 s: values stay. Raises BrokerUnavailable."""
        shape = LogShape(
            name=f"KV_{bucket}",
            subjects=(f"$KV.{bucket}.>",),
            newest_only=True,
            age_max_s=ttl_s,
            keeps=True,
            replicas=replicas,
        )
        await Log.open(bus, shape)
        return cls(bus, bucket, key)

    async def get(self) -> tuple[bytes, int] | None:
        """Value and revision; None where there is none. Raises BrokerUnavailable."""
        found = await self._log.newest(self._subject)
        return (found.data, found.sequence) if found is not None and found.data else None

    async def create(self, value: bytes) -> int | None:
        """Sets the value where there is none; its revision, or None when there is one.

        Raises OutcomeUnknown, BrokerUnavailable.
        """
        assert value, "an empty value is none"
        found = await self._log.newest(self._subject)
        if found is not None and found.data:
            return None
        return await self.update(value, found.sequence if found is not None else 0)

    async def update(self, value: bytes, revision: int) -> int | None:
        """Sets the value if its revision is still this one; the new one, or None.

        Raises OutcomeUnknown.
        """
        try:
            return await self._log.append(
                self._subject, value, guard=AppendCondition(self._subject, revision)
            )
        except LogMoved:
            return None

    async def delete(self, revision: int) -> bool:
        """Drops the value if its revision is still this one. Raises OutcomeUnknown."""
        return await self.update(b"", revision) is not None

    async def watch(self) -> Feed[bytes | None]:
        """The value now (None: there is none) and whenever it changes; of those that were not
        taken the newest are kept. A broker that is away is waited for.
        """
        feed: Feed[bytes | None] = Feed(16)
        feed.attach(self._bus.own(self._keep_watching(feed)))
        return feed

    async def _keep_watching(self, feed: Feed[bytes | None]) -> None:
        while True:
            with suppress(Broken):
                delivery = await Delivery.open(
                    self._bus, self._log.name, self._subject, newest=True
                )
                try:
                    if not delivery.pending:
                        feed.put(None)
                    while True:
                        entry, _ = await delivery.next()
                        feed.put(entry.data or None)
                finally:
                    await delivery.close()
            await asyncio.sleep(_AGAIN_S)
