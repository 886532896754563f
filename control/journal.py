"""The journal: a JetStream stream with everything needed to lead on after a crash and to replay
every decision.

What a client was promised is acknowledged by the broker's disk before the promise leaves
(`append`); observations and plans are written without waiting (`note`): they serve replay, and
losing the last of them loses no request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import nats.errors
from nats.js.api import DeliverPolicy, RetentionPolicy, StreamConfig
from nats.js.errors import KeyWrongLastSequenceError, NotFoundError

from hocket.bus import Bus, Subjects
from hocket.errors import BrokerUnavailable
from hocket.v1 import journal_pb2

_BYTES_MAX = 1 << 30  # oldest entries go first
_READ_WAIT_S = 5.0


@dataclass(frozen=True)
class Stored:
    """An entry as read back, with the broker's wall-clock stamp."""

    entry: journal_pb2.JournalEntry
    unix_us: int


class Journal:
    """Writes entries of one term, in order."""

    def __init__(self, bus: Bus, subjects: Subjects, term: int) -> None:
        self._bus = bus
        self._subjects = subjects
        self.term = term
        self._sequence = 0

    @classmethod
    async def open(cls, bus: Bus, subjects: Subjects) -> Journal:
        """Creates the stream where needed and takes the next term (a KV revision)."""
        await bus.jetstream.add_stream(
            StreamConfig(
                name=subjects.journal_stream,
                subjects=[subjects.journal("*")],
                retention=RetentionPolicy.LIMITS,
                max_bytes=_BYTES_MAX,
            )
        )
        return cls(bus, subjects, await _take_term(bus, subjects))

    async def raise_term(self, above: int) -> None:
        """Sees to it that the next leader's term is higher than `above`."""
        store = await self._bus.jetstream.key_value(self._subjects.leader_bucket)
        revision = self.term
        while revision < above:
            revision = await store.put("leader", b"")

    async def append(self, entry: journal_pb2.JournalEntry, message_id: str) -> None:
        """Returns once the broker has stored the entry; a repeated `message_id` is stored once.

        Raises BrokerUnavailable when it does not say so in time; then nothing was promised.
        """
        try:
            await self._bus.jetstream.publish(
                self._subject(entry),
                self._numbered(entry).SerializeToString(),
                headers={"Nats-Msg-Id": message_id},
            )
        except nats.errors.Error as error:
            raise BrokerUnavailable(url="JetStream", cause=str(error) or "no answer") from error

    async def note(self, entry: journal_pb2.JournalEntry) -> None:
        """Hands the entry to the broker without waiting for its disk."""
        await self._bus.publish(self._subject(entry), self._numbered(entry))

    def _numbered(self, entry: journal_pb2.JournalEntry) -> journal_pb2.JournalEntry:
        self._sequence += 1
        entry.term, entry.sequence = self.term, self._sequence
        return entry

    def _subject(self, entry: journal_pb2.JournalEntry) -> str:
        return self._subjects.journal(entry.WhichOneof("entry") or "none")


async def read(bus: Bus, subjects: Subjects, kind: str = "*") -> AsyncIterator[Stored]:
    """Stored entries of one kind ("*": all), oldest first, up to the newest at the call."""
    subject = subjects.journal(kind)
    try:
        info = await bus.jetstream.stream_info(subjects.journal_stream, subjects_filter=subject)
    except NotFoundError:
        return
    if not info.state.subjects:
        return
    feed = await bus.jetstream.subscribe(
        subject,
        stream=subjects.journal_stream,
        ordered_consumer=True,
        deliver_policy=DeliverPolicy.ALL,
    )
    try:
        while True:
            message = await feed.next_msg(timeout=_READ_WAIT_S)
            meta = message.metadata
            yield Stored(
                entry=journal_pb2.JournalEntry.FromString(message.data),
                unix_us=int(meta.timestamp.timestamp() * 1e6),
            )
            if meta.num_pending == 0:
                return
    finally:
        await feed.unsubscribe()


async def _take_term(bus: Bus, subjects: Subjects) -> int:
    store = await bus.jetstream.create_key_value(bucket=subjects.leader_bucket)
    while True:
        try:
            held = (await store.get("leader")).revision
        except NotFoundError:
            held = 0
        try:
            return await store.update("leader", b"", last=held)
        except KeyWrongLastSequenceError:
            continue  # somebody else took that term
