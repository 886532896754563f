"""Notes on their way from an executor to the agent: bounded, and never lost.

A compute thread that tells faster than the bus takes waits for room; the emulated executor, which
lives on the agent's own loop, waits in `room` before its next step.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque

from gpuworker.executor import RunNote

_NOTES_MAX = 64
_MEDIA_BYTES_MAX = 256 << 20  # of files that wait in notes


class NoteOutbox:
    """Create it on the agent's loop. `put` may be called from any thread."""

    def __init__(self, notes_max: int = _NOTES_MAX) -> None:
        self._notes_max = notes_max
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._changed = threading.Condition()
        self._notes: deque[RunNote] = deque()
        self._keys: Counter[tuple[int, int]] = Counter()  # not told yet, by term and sequence
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def put(self, note: RunNote) -> None:
        """Takes a note. Blocks while there is no room, but for the loop's own thread."""
        with self._changed:
            if threading.get_ident() != self._thread:
                self._changed.wait_for(lambda: self._closed or not self._is_full())
            if self._closed:
                return  # nobody reports any more
            self._notes.append(note)
            self._keys[note.assignment.term, note.assignment.sequence] += 1
        if threading.get_ident() == self._thread:
            self._look()
        else:
            self._loop.call_soon_threadsafe(self._look)

    async def room(self) -> None:
        """Returns when there is room for a note; at once where there is."""
        if not self._room.is_set():
            await self._room.wait()

    async def take(self) -> RunNote:
        """The oldest note, once there is one."""
        while True:
            with self._changed:
                if self._notes:
                    note = self._notes.popleft()
                    self._changed.notify_all()
                    break
            self._filled.clear()
            await self._filled.wait()
        self._look()
        return note

    def told(self, note: RunNote) -> None:
        """A note that was taken is on its way to control."""
        with self._changed:
            key = (note.assignment.term, note.assignment.sequence)
            self._keys[key] -= 1
            if self._keys[key] <= 0:
                del self._keys[key]

    def untold(self, term: int) -> tuple[int, ...]:
        """Assignments of a term of which something is still to be told, by sequence number."""
        with self._changed:
            return tuple(sequence for known, sequence in self._keys if known == term)

    @property
    def is_empty(self) -> bool:
        """Whether all that was put has been told."""
        with self._changed:
            return not self._keys

    def close(self) -> None:
        """The end: nobody waits here for room any more, and what comes is let go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _look(self) -> None:
        with self._changed:
            filled, full = bool(self._notes), self._is_full()
        if filled:
            self._filled.set()
        if full:
            self._room.clear()
        else:
            self._room.set()

    def _is_full(self) -> bool:
        media = sum(len(m.content) for note in self._notes for m in note.media.values())
        return len(self._notes) >= self._notes_max or media >= _MEDIA_BYTES_MAX
