"""Those who wait for a request: what one of them has been told, and is still to be told.

A follower's mailbox is bounded. What gives way when its caller is slow is progress, the oldest
first; everything else about a request is at most a handful of messages.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque

from hocket.errors import HocketError, RequestFailed, UnknownRequest
from hocket.v1.control_pb2 import Follow, Followed
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import Failure

BACKLOG_MAX = 32
_ENDINGS = ("finished", "failed", "cancelled")


class Follower:
    """One caller's view of one request. Made by a call, fed by the line, read by the call."""

    def __init__(
        self, request_id: str, cursor: int = 0, *, onlooker: bool = False, tenant: str | None = None
    ) -> None:
        """`cursor`: sequence of the last event that is known already. An `onlooker` keeps nothing
        from being cancelled. `tenant`: whose requests it may see; None: anybody's."""
        self.name = f"f-{secrets.token_hex(12)}"
        self.request_id = request_id
        self.cursor = cursor  # of the newest event that has come
        self.awaits = False  # control's word on what it missed; until then events are no news
        self.progress_dropped = 0
        self._onlooker = onlooker
        self._tenant = tenant
        self._box: deque[RequestEvent] = deque()
        self._refused: HocketError | None = None
        self._came = asyncio.Event()

    def as_follow(self) -> Follow:
        """What control is told, at first and after each new stream."""
        self.awaits = True
        return Follow(
            follower=self.name,
            request_id=self.request_id,
            cursor=self.cursor,
            onlooker=self._onlooker,
            tenant=self._tenant,
        )

    def told(self, followed: Followed) -> None:
        """Control's answer: what was missed, or that there is nothing to follow."""
        self.awaits = False
        if followed.HasField("refused"):
            self._refused = _refusal(self.request_id, followed.refused)
            self._came.set()
        for event in followed.missed:
            self.put(event)

    def put(self, event: RequestEvent) -> None:
        """Takes an event; one that is not newer than the cursor has been told, and what comes
        before control's answer is in it.
        """
        if self.awaits or event.sequence <= self.cursor:
            return
        self.cursor = event.sequence
        if len(self._box) >= BACKLOG_MAX:
            self._drop_progress()
        self._box.append(event)
        self._came.set()

    async def next(self) -> RequestEvent:
        """The next event, waiting as long as it takes; raises UnknownRequest, or what else control
        says where there is nothing to follow."""
        while not self._box:
            if self._refused is not None:
                raise self._refused
            self._came.clear()
            await self._came.wait()
        return self._box.popleft()

    def _drop_progress(self) -> None:
        for place, event in enumerate(self._box):
            if event.HasField("progress"):
                del self._box[place]
                self.progress_dropped += 1
                return


class FollowerIndex:
    """Followers by name and by request."""

    def __init__(self) -> None:
        self._by_name: dict[str, Follower] = {}
        self._by_request: dict[str, dict[str, Follower]] = {}
        self._filed: dict[str, str] = {}  # name -> request under which it is found

    def __len__(self) -> int:
        return len(self._by_name)

    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def get(self, name: str) -> Follower | None:
        return self._by_name.get(name)

    def of(self, request_id: str) -> tuple[Follower, ...]:
        return tuple(self._by_request.get(request_id, {}).values())

    def add(self, follower: Follower) -> None:
        """Files it under the request that it follows now."""
        self.remove(follower)
        self._by_name[follower.name] = follower
        self._by_request.setdefault(follower.request_id, {})[follower.name] = follower
        self._filed[follower.name] = follower.request_id

    def remove(self, follower: Follower) -> bool:
        """Whether it was there."""
        if self._by_name.pop(follower.name, None) is None:
            return False
        request_id = self._filed.pop(follower.name)
        same = self._by_request[request_id]
        del same[follower.name]
        if not same:
            del self._by_request[request_id]
        return True


def is_ending(event: RequestEvent) -> bool:
    """Whether nothing comes after it."""
    return event.WhichOneof("event") in _ENDINGS


def _refusal(request_id: str, failure: Failure) -> HocketError:
    if failure.reason == "UNKNOWN_REQUEST":
        return UnknownRequest(request_id)
    return RequestFailed(failure.reason, failure.message, dict(failure.metadata))
