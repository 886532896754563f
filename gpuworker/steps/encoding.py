"""Finished frames become files beside the compute thread, which goes on with its next assignment.

The codecs release the interpreter while they work. What waits for a thread is bounded in number and
in bytes; whoever brings more waits, so that a worker that makes frames faster than it can encode
them is as fast as its encoders, and no faster.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpuworker.executor import Listener, RunNote
from hocket.clock import steady_ns

log = logging.getLogger(__name__)

_THREADS = 2
_WAITING_MAX = 4  # files
_WAITING_BYTES_MAX = 512 << 20  # of frames; one file's may be more, alone

Work = Callable[[], None]  # raises nothing that it could tell somebody of


class _Waiting(NamedTuple):
    work: Work
    size_bytes: int


class EncodingThreads:
    """Thread-safe. The threads start with the first file, and end with the process at the latest:
    a long video keeps nobody from leaving.
    """

    def __init__(
        self,
        threads: int = _THREADS,
        waiting_max: int = _WAITING_MAX,
        bytes_max: int = _WAITING_BYTES_MAX,
    ) -> None:
        self._count, self._waiting_max, self._bytes_max = threads, waiting_max, bytes_max
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._threads: list[threading.Thread] = []
        self._working_bytes = 0
        self._closed = False

    def submit(self, size_bytes: int, work: Work) -> None:
        """Has it done, once those before it are in hand; blocks while there is no room.

        After `close` it is let go.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(size_bytes))
            if self._closed:
                return
            self._waiting.append(_Waiting(work, size_bytes))
            self._changed.notify_all()
            if len(self._threads) < self._count:
                name = f"encode-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    @property
    def size_bytes(self) -> int:
        """Of the frames that wait, or are being encoded."""
        with self._changed:
            return self._waiting_bytes() + self._working_bytes

    def stop(self) -> None:
        """Lets go of what has not begun, and of whoever waits for room."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def close(self, patience_s: float) -> None:
        """Stops, and waits so long for what is in hand."""
        self.stop()
        end_ns = steady_ns() + int(patience_s * 1e9)
        for thread in self._threads:
            thread.join(max(0, end_ns - steady_ns()) / 1e9)

    def _has_room(self, size_bytes: int) -> bool:
        waiting = len(self._waiting)
        full = waiting >= self._waiting_max
        return not waiting or not (full or self._waiting_bytes() + size_bytes > self._bytes_max)

    def _waiting_bytes(self) -> int:
        return sum(each.size_bytes for each in self._waiting)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                work, size_bytes = self._waiting.popleft()
                self._working_bytes += size_bytes
                self._changed.notify_all()
            try:
                work()
            except Exception:
                log.exception("a file was made, or was not, and nobody could be told")
            del work  # it holds the frames
            with self._changed:
                self._working_bytes -= size_bytes


class NotesInOrder:
    """The notes of one assignment, told in the order of their places: a file that is still being
    made holds back those behind it. Thread-safe.
    """

    def __init__(self, listener: Listener, over: Callable[[], None]) -> None:
        """`over` is called once, when `close` was called and every note is told."""
        self._listener, self._over = listener, over
        self._lock = threading.Lock()
        self._places: deque[list[RunNote] | None] = deque()  # None: not known yet
        self._first = 0  # number of the first place
        self._telling = False
        self._closed = False

    def __call__(self, note: RunNote) -> None:
        """Takes the next place, with a note that is ready."""
        self.fill(self.place(), (note,))

    def place(self) -> int:
        """Takes the next place, for `fill`."""
        with self._lock:
            self._places.append(None)
            return self._first + len(self._places) - 1

    def fill(self, place: int, notes: Sequence[RunNote]) -> None:
        """What is to be told there."""
        with self._lock:
            self._places[place - self._first] = list(notes)
        self._tell()

    def close(self) -> None:
        """No place is taken any more."""
        with self._lock:
            self._closed = True
        self._tell()

    def _tell(self) -> None:
        """Whoever is here first tells for all, in which the listener may block."""
        while True:
            with self._lock:
                if self._telling:
                    return
                notes = self._places[0] if self._places else None
                if notes is None:
                    over = self._closed and not self._places
                    self._telling = over  # nothing comes behind it
                    break
                self._places.popleft()
                self._first += 1
                self._telling = True
            try:
                for note in notes:
                    self._listener(note)
            finally:
                with self._lock:
                    self._telling = False
        if over:
            self._over()
