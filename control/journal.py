"""The diary: observed facts and plans, from which every decision of a leader can be replayed.

It may go: oldest entries go first, a broker that is away loses some, one without room for it has
none, and no leader ends by that. What was promised stands elsewhere, see `promises`. Entries of
older versions' journals (`accepted`, `ended`) are read as before.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from control.leading.promises import open_bounded
from hocket.errors import BrokerUnavailable, WrongConfig
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import Log, LogShape
from hocket.v1 import journal_pb2

log = logging.getLogger(__name__)

_PIECE_BYTES = 256 << 10  # far below what a broker's message may have


@dataclass(frozen=True)
class StoredEntry:
    """An entry as read back, with the broker's wall-clock stamp."""

    entry: journal_pb2.JournalEntry
    unix_us: int


class Journal:
    """Writes the diary of one term, in order."""

    def __init__(self, bus: Bus, subjects: Subjects, term: int) -> None:
        self._bus = bus
        self._subjects = subjects
        self._sequence = 0
        self.term = term

    @classmethod
    async def open(
        cls, bus: Bus, subjects: Subjects, term: int = 1, bytes_max: int = 0, replicas: int = 1
    ) -> Journal:
        """Makes the stream where needed; 0 bytes: what the broker has room for. Without room, or
        an answer, what is noted goes nowhere, which is said in the log.
        """
        try:
            await open_bounded(
                bus,
                lambda size: LogShape(
                    name=subjects.journal_stream,
                    subjects=(subjects.journal("*"),),
                    bytes_max=size,
                    oldest_go=True,
                    replicas=replicas,
                ),
                bytes_max,
                "diary_bytes_max",
            )
        except (BrokerUnavailable, WrongConfig) as error:
            log.warning("no diary is kept: %s", error)
        return cls(bus, subjects, term)

    async def note(self, entry: journal_pb2.JournalEntry) -> None:
        """Hands the entry to the broker without waiting for its disk."""
        self._sequence += 1
        entry.term, entry.sequence = self.term, self._sequence
        await self._bus.publish(self._subject(entry), entry)

    async def note_start(self, stamped_us: int, started: journal_pb2.LeaderStarted) -> None:
        """Notes all that the plans of this term rest on beside the facts, in as many entries as it
        takes.
        """
        for piece in pieces(started):
            await self.note(journal_pb2.JournalEntry(stamped_us=stamped_us, leader_started=piece))

    def _subject(self, entry: journal_pb2.JournalEntry) -> str:
        return self._subjects.journal(entry.WhichOneof("entry") or "none")


def pieces(started: journal_pb2.LeaderStarted) -> list[journal_pb2.LeaderStarted]:
    """The same as messages that the broker takes."""
    if started.ByteSize() <= _PIECE_BYTES:
        return [started]
    packed = zlib.compress(started.SerializeToString())
    parts = [packed[at : at + _PIECE_BYTES] for at in range(0, len(packed), _PIECE_BYTES)]
    return [
        journal_pb2.LeaderStarted(piece=part, piece_index=index, pieces=len(parts))
        for index, part in enumerate(parts)
    ]


def joined(found: Iterable[journal_pb2.LeaderStarted]) -> journal_pb2.LeaderStarted | None:
    """What `pieces` took apart; None where some are missing."""
    found = list(found)
    if not found or not found[0].pieces:
        return found[0] if found else None
    by_index = {piece.piece_index: piece.piece for piece in found}
    if len(by_index) != found[0].pieces:
        return None
    packed = b"".join(by_index[index] for index in sorted(by_index))
    return journal_pb2.LeaderStarted.FromString(zlib.decompress(packed))


async def read(bus: Bus, subjects: Subjects, kind: str = "*") -> AsyncIterator[StoredEntry]:
    """Stored entries of one kind ("*": all), oldest first, up to the newest at the call.

    Raises BrokerUnavailable when it breaks off.
    """
    diary = Log(bus, subjects.journal_stream)
    async for entry in diary.read(subjects.journal(kind), history=True):
        yield StoredEntry(journal_pb2.JournalEntry.FromString(entry.data), entry.unix_us)
