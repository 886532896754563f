"""What waits to be said on one gateway's line, bounded.

Answers come before what follows them, and events of one request stay in order. When a slow line
lets too much gather, progress gives way: of each request the newest is kept. Endings never do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import MutableSequence
from typing import TypeVar

from google.protobuf.message import Message

from hocket.v1 import control_pb2, mesh_pb2

M = TypeVar("M", bound=Message)

EVENTS_MAX = 4096  # beyond it progress gives way
_MESSAGE_BYTES_MAX = 1 << 20  # far below what gRPC takes


class Outbox:
    """Filled by whoever has something to say, emptied by the line's writer."""

    def __init__(self) -> None:
        self._answers: deque[control_pb2.AttachedAnswer] = deque()
        self._followed: deque[control_pb2.Followed] = deque()
        self._events: deque[mesh_pb2.RequestEvent] = deque()
        self._events_max = EVENTS_MAX
        self._something = asyncio.Event()
        self.dropped = 0  # progress that a slow line never heard
        self.is_closed = False

    def answer(self, answer: control_pb2.AttachedAnswer) -> None:
        self._answers.append(answer)
        self._something.set()

    def followed(self, followed: control_pb2.Followed) -> None:
        self._followed.append(followed)
        self._something.set()

    def event(self, event: mesh_pb2.RequestEvent) -> None:
        self._events.append(event)
        self._something.set()
        if len(self._events) > self._events_max:
            self._shed()

    def beat(self) -> None:
        """Lets the writer say something, if only that control lives."""
        self._something.set()

    def close(self) -> None:
        """The line has ended: nobody empties this any more."""
        self.is_closed = True
        for waiting in (self._answers, self._followed, self._events):
            waiting.clear()

    async def take(self, term: int) -> control_pb2.AttachResponse:
        """The next message, once there is something to say."""
        await self._something.wait()
        await asyncio.sleep(0)  # whatever else belongs to this moment goes along
        room = _MESSAGE_BYTES_MAX
        message = control_pb2.AttachResponse(term=term)
        room = _take(self._answers, message.answers, room)
        room = _take(self._followed, message.followed, room)
        _take(self._events, message.events, room)
        if not (self._answers or self._followed or self._events):
            self._something.clear()
            self._events_max = EVENTS_MAX
        return message

    def _shed(self) -> None:
        newest = {e.request_id: e.sequence for e in self._events}
        kept = deque(
            e
            for e in self._events
            if not e.HasField("progress") or newest[e.request_id] == e.sequence
        )
        self.dropped += len(self._events) - len(kept)
        self._events = kept
        self._events_max = max(EVENTS_MAX, 2 * len(kept))  # looked through once a doubling


def _take(waiting: deque[M], said: MutableSequence[M], room: int) -> int:
    """Moves what there is room for; returns what is left of it, in bytes."""
    while waiting and room > 0:
        item = waiting.popleft()
        room -= item.ByteSize()
        said.append(item)
    return room
