"""A line's far end in memory, and a clock that a test moves: no sockets, no real time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.line import GATHER_US, Dial, Line, LinkBroken
from gateway.whereabouts import Addresses
from hocket.clock import ManualClock
from hocket.v1.control_pb2 import (
    AttachedAnswer,
    AttachRequest,
    AttachResponse,
    SubmitResponse,
)
from hocket.v1.generation_pb2 import Accepted

_TURNS = 20  # of the event loop, until whatever was woken has run


class MemoryLink:
    """Both ends of one stream."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[AttachRequest] = []  # by the gateway
        self.closed = False
        self._down: asyncio.Queue[AttachResponse | LinkBroken] = asyncio.Queue()

    async def send(self, message: AttachRequest) -> None:
        if self.closed:
            raise LinkBroken("closed")
        self.said.append(message)

    async def receive(self) -> AttachResponse:
        message = await self._down.get()
        if isinstance(message, LinkBroken):
            raise message
        return message

    async def close(self) -> None:
        self.closed = True

    def say(self, message: AttachResponse | None = None) -> None:
        """Control says something; nothing in particular: it lives."""
        self._down.put_nowait(message or AttachResponse(term=1))

    def answer(self, call: int, answer: SubmitResponse) -> None:
        self.say(AttachResponse(term=1, answers=[AttachedAnswer(call=call, answer=answer)]))

    def accept(self, call: int, request_id: str) -> None:
        accepted = Accepted(request_id=request_id)
        self.answer(call, SubmitResponse(request_id=request_id, accepted=accepted))

    def break_off(self, leader: str = "") -> None:
        self._down.put_nowait(LinkBroken("broken by the test", leader))

    @property
    def submits(self) -> list[str]:
        return [s.submit.request_id for m in self.said for s in m.submits]

    @property
    def follows(self) -> list[tuple[str, int]]:
        return [(f.request_id, f.cursor) for m in self.said for f in m.follows]

    @property
    def leaves(self) -> list[tuple[str, bool]]:
        return [(leave.follower, leave.returns) for m in self.said for leave in m.leaves]


@dataclass
class Wire:
    """A line, its clock and all the links that it ever opened."""

    clock: ManualClock
    line: Line
    dial: Dial
    links: list[MemoryLink] = field(default_factory=list)
    leaders: list[str] = field(default_factory=list)  # as the line told of them

    @property
    def link(self) -> MemoryLink:
        return self.links[-1]

    def another(self) -> Line:
        """A line of the test's own, to run and to end; its links are added to these."""
        return Line("other", Addresses(lambda: ("a",)), self.dial, self.clock, lambda _: None)

    async def settle(self) -> None:
        """Whatever was woken has run, and what the line gathered is said."""
        await self._turn()
        said_us = self.clock.now_us() + GATHER_US
        while (wake_us := self.clock.next_wake_us()) is not None and wake_us <= said_us:
            self.clock.advance_to(wake_us)
            await self._turn()

    async def _turn(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    async def pass_us(self, span_us: int) -> None:
        """Time passes, and whoever waited for it goes on, in order."""
        end_us = self.clock.now_us() + span_us
        await self._turn()
        while (wake_us := self.clock.next_wake_us()) is not None and wake_us <= end_us:
            self.clock.advance_to(wake_us)
            await self._turn()
        self.clock.advance_to(end_us)
        await self._turn()


@asynccontextmanager
async def wired(*addresses: str, greet: Callable[[str], bool] = bool) -> AsyncIterator[Wire]:
    """A running line to replicas at these addresses; those that `greet` names say hello."""
    clock = ManualClock()

    async def dial(address: str) -> MemoryLink:
        link = MemoryLink(address)
        wire.links.append(link)
        if greet(address):
            link.say()
        return link

    where = Addresses(lambda: addresses)
    leaders: list[str] = []
    wire = Wire(clock, Line("g", where, dial, clock, leaders.append), dial, leaders=leaders)
    running = asyncio.ensure_future(wire.line.run())
    await wire.settle()
    try:
        yield wire
    finally:
        assert not running.done(), running.exception()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
