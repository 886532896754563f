"""Gateways' lines: what they ask, whom they follow, and everything that happens to it.

    line ── submits ──▶ admission ── answer ──▶ outbox ──▶ line
         ── follows ──▶ followers                  ▲
         ── leaves  ──▶ followers ──▶ cancel       │
                               events of requests ─┘

A line is anything with `send` and `receive`; gRPC is one such thing (`GrpcLine`). It ends when its
other side ends it, or says nothing for `SILENT_US`; its followers then have the grace to return.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import grpc

from control.admission import AdmissionControl
from control.requests.followers import Followers
from control.requests.outbox import Outbox
from control.requests.records import ACCEPTED, Records
from control.requests.telling import is_known
from hocket.clock import Clock
from hocket.v1 import control_pb2, mesh_pb2, types_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable

log = logging.getLogger(__name__)

BEAT_US = 1_000_000
SILENT_US = 3_000_000
_RETRY_US = 1_000_000


@dataclass
class LineBroken(Exception):
    """The other side of a line is gone."""

    cause: str

    def __str__(self) -> str:
        return self.cause


class GatewayStream(Protocol):
    """One gateway's stream, seen from control."""

    async def receive(self) -> control_pb2.AttachRequest | None:
        """The next message; None at the end. Raises LineBroken."""

    async def send(self, message: control_pb2.AttachResponse) -> None:
        """Returns when there is room for another. Raises LineBroken."""


@dataclass(eq=False)
class _Attached:
    """One line while it lasts."""

    line: GatewayStream
    heard_us: int
    outbox: Outbox = field(default_factory=Outbox)
    gateway: str = ""
    asking: set[str] = field(default_factory=set)  # followers whose answer is awaited
    left: dict[str, bool] = field(default_factory=dict)  # of those, who left; whether it returns


class Attachments:
    """All lines of this leader, and the one place where events are handed to them."""

    def __init__(
        self,
        admission: AdmissionControl,
        records: Records,
        followers: Followers,
        cancel: Callable[[str], None],
        clock: Clock,
        term: int,
        troubles: Counter[str] | None = None,
    ) -> None:
        self._admission = admission
        self._records = records
        self._followers = followers
        self._cancel = cancel
        self._clock = clock
        self._term = term
        self._expiry = asyncio.Event()
        self._lines: set[_Attached] = set()
        self._troubles = Counter[str]() if troubles is None else troubles

    @property
    def lines(self) -> int:
        return len(self._lines)

    def tell(self, event: mesh_pb2.RequestEvent) -> None:
        """Something happened to a request: whoever follows it hears of it."""
        for attached in self._followers.lines_of(event.request_id):
            assert isinstance(attached, _Attached)
            attached.outbox.event(event)
        if event.WhichOneof("event") in ("finished", "failed", "cancelled"):
            self._followers.ended(event.request_id)

    def expect_followers(self, request: str) -> None:
        """Of a request of an earlier leader: who followed it there comes back, or gave up."""
        self._followers.expect(request, self._clock.now_us())
        self._expiry.set()

    async def run(self) -> None:
        """Ends graces that are over, until cancelled."""
        while True:
            next_us = self._followers.next_expiry_us()
            if next_us is None:
                self._expiry.clear()
                await self._expiry.wait()
                continue
            await self._clock.sleep_until(next_us)
            self._unfollowed(self._followers.expire(self._clock.now_us()))

    async def attach(self, line: GatewayStream) -> None:
        """Serves a line until it ends."""
        attached = _Attached(line, self._clock.now_us())
        self._lines.add(attached)
        parts: list[Awaitable[None]] = [
            self._read(attached),
            self._write(attached),
            self._pulse(attached),
        ]
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except LineBroken as broken:
            log.info("the line of gateway %s broke: %s", attached.gateway or "?", broken)
        finally:
            for task in tasks:
                task.cancel()
            self._end(attached)
            await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, attached: _Attached) -> None:
        self._lines.discard(attached)
        self._troubles["dropped progress"] += attached.outbox.dropped
        attached.outbox.close()
        self._followers.lost(attached, self._clock.now_us())
        self._expiry.set()

    # ---------------------------------------------------------------------------- one line

    async def _read(self, attached: _Attached) -> None:
        while (message := await attached.line.receive()) is not None:
            attached.heard_us = self._clock.now_us()
            attached.gateway = message.gateway or attached.gateway
            for submit in message.submits:
                self._submit(attached, submit)
            for follow in message.follows:
                self._follow(attached, follow)
            for leave in message.leaves:
                self._leave(attached, leave)

    async def _write(self, attached: _Attached) -> None:
        attached.outbox.beat()  # the first word tells the term
        while True:
            await attached.line.send(await attached.outbox.take(self._term))

    async def _pulse(self, attached: _Attached) -> None:
        while True:
            await self._clock.sleep_until(self._clock.now_us() + BEAT_US)
            silent_us = self._clock.now_us() - attached.heard_us
            if silent_us > SILENT_US:
                raise LineBroken(f"it said nothing for {silent_us / 1e6:.1f} s")
            attached.outbox.beat()

    def _submit(self, attached: _Attached, asked: control_pb2.AttachedSubmit) -> None:
        if asked.follower:
            attached.asking.add(asked.follower)
        self._admission.offer(
            asked.submit,
            answered=partial(self._answered, attached, asked.call, asked.follower),
            wanted=partial(self._is_wanted, attached, asked),
            expires_us=self._clock.now_us() + asked.expires_us if asked.expires_us else None,
            traceparent=asked.traceparent,
        )

    def _is_wanted(self, attached: _Attached, asked: control_pb2.AttachedSubmit) -> bool:
        """A caller that gave up before anything was promised is not promised anything."""
        gave_up = attached.left.get(asked.follower, True) is False
        return asked.submit.request.detached or not gave_up

    def _answered(
        self,
        attached: _Attached,
        call: int,
        follower: str,
        answer: control_pb2.SubmitResponse,
        repeated: bool,
    ) -> None:
        attached.outbox.answer(control_pb2.AttachedAnswer(call=call, answer=answer))
        attached.asking.discard(follower)
        left = attached.left.pop(follower, None)
        record = self._records.get(answer.request_id)
        if not follower or record is None or not answer.HasField("accepted"):
            return
        self._followers.follow(follower, record.id, attached)
        if repeated:
            missed = record.since(0)
            attached.outbox.followed(control_pb2.Followed(follower=follower, missed=missed))
        else:
            for event in record.since(ACCEPTED):  # which the answer has told
                attached.outbox.event(event)
        now_us = self._clock.now_us()
        if left is not None:
            self._unfollowed(self._followers.leave(follower, attached, now_us, returns=left))
        elif attached.outbox.is_closed:
            self._followers.lost(attached, now_us)
        self._expiry.set()

    def _follow(self, attached: _Attached, follow: control_pb2.Follow) -> None:
        record = self._records.get(follow.request_id)
        told = control_pb2.Followed(follower=follow.follower)
        if record is None or not is_known(record, _tenant(follow)):
            told.refused.CopyFrom(_unknown(follow.request_id))
        elif record.is_open and self._followers.is_full():
            told.refused.CopyFrom(_overloaded())
        else:
            told.missed.extend(record.since(follow.cursor))
            if record.is_open:
                self._followers.follow(
                    follow.follower, record.id, attached, onlooker=follow.onlooker
                )
        attached.outbox.followed(told)

    def _leave(self, attached: _Attached, leave: control_pb2.Leave) -> None:
        if leave.follower in attached.asking:
            attached.left[leave.follower] = leave.returns
            return
        now_us = self._clock.now_us()
        self._unfollowed(
            self._followers.leave(leave.follower, attached, now_us, returns=leave.returns)
        )
        self._expiry.set()

    def _unfollowed(self, requests: tuple[str, ...]) -> None:
        for request in requests:
            record = self._records.get(request)
            if record is not None and record.is_open and not record.detached:
                log.info("nobody follows %s any more: it is cancelled", request)
                self._cancel(request)


class GrpcLine:
    """A gateway's Attach stream: `messages` are what its handler yields."""

    def __init__(self, requests: AsyncIterable[control_pb2.AttachRequest]) -> None:
        self._requests = aiter(requests)
        self._message: control_pb2.AttachResponse | None = None  # on its way out
        self._changed = asyncio.Event()
        self._is_over = False

    async def receive(self) -> control_pb2.AttachRequest | None:
        try:
            return await anext(self._requests, None)
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise LineBroken(str(error)) from error

    async def send(self, message: control_pb2.AttachResponse) -> None:
        while self._message is not None:
            await self._change()
        self._message = message
        self._changed.set()

    def end(self) -> None:
        """Nothing more will be sent."""
        self._is_over = True
        self._changed.set()

    async def messages(self) -> AsyncIterator[control_pb2.AttachResponse]:
        """What was sent, one by one, as fast as the stream takes it."""
        while not self._is_over:
            if self._message is None:
                await self._change()
                continue
            message, self._message = self._message, None
            self._changed.set()
            yield message

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _tenant(follow: control_pb2.Follow) -> str | None:
    return follow.tenant if follow.HasField("tenant") else None


def _unknown(request: str) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="UNKNOWN_REQUEST", message=f"no request {request!r} is known here"
    )


def _overloaded() -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="OVERLOADED",
        message="more callers follow requests than this leader takes",
        retry_after_us=_RETRY_US,
    )
