"""The gateway's line to the leader of the control plane: one stream, open as long as the gateway.

    callers -- submit, follow, leave --> | gathered for   | -- one message --> leader
                                         | 5 ms behind    |
    callers <-- answers, events -------- | the last one   | <-- one message -- leader

Each side says something every second. After three seconds of silence, or when the stream breaks,
the line looks for the leader anew, says again whom it follows and from where on, and repeats what
has no answer yet: ids of requests are used once, so that a repeat is harmless. Callers of accepted
requests notice nothing of all this but the delay.

What carries the messages is a `Link`; `gateway.grpc_link` is the one over gRPC. All waiting is on a
`Clock`, so that the simulation can run this code on a clock and a link of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

from gateway.follower import Follower, FollowerIndex
from hocket.clock import Clock
from hocket.errors import ControlUnavailable
from hocket.v1.control_pb2 import (
    AttachRequest,
    AttachResponse,
    Leave,
    SubmitRequest,
    SubmitResponse,
)

log = logging.getLogger(__name__)
K = TypeVar("K", int, str)

BEAT_US = 1_000_000
SILENCE_US_MAX = 3_000_000
GATHER_US = 5_000  # between two messages: each costs both sides more than what it carries
_EXPIRY_CHECK_US = 250_000
_BACKOFF_US = (50_000, 100_000, 200_000, 400_000, 800_000)
_GIVEN_UP_MAX = 10_000
_SUBMITS_A_MESSAGE = 128  # a prompt of 2,000 characters is up to 8 KB, a message at most 4 MiB
_WORKFLOW_BYTES_A_MESSAGE = 1 << 20
_FOLLOWS_A_MESSAGE = 4096


@dataclass
class LinkBroken(Exception):
    """The stream to a control replica ended."""

    cause: str
    leader: str = ""  # "host:port" of the leader, where the replica named it

    def __str__(self) -> str:
        return self.cause


class Link(Protocol):
    """One stream to one control replica."""

    async def send(self, message: AttachRequest) -> None:
        """Returns once the message is on its way; raises LinkBroken."""

    async def receive(self) -> AttachResponse:
        """The next message; raises LinkBroken when there is none."""

    async def close(self) -> None:
        """Ends the stream; both other calls then raise LinkBroken. Never fails."""


class Whereabouts(Protocol):
    """Where the leader may be."""

    def next(self) -> str:
        """The address to try now ("host:port"), another one at each call if there are several;
        empty: none is known."""

    def hint(self, address: str) -> None:
        """A replica named this one as the leader: the next one to be tried."""


Dial = Callable[[str], Awaitable[Link]]
OnChange = Callable[[str], None]


@dataclass
class _Call:
    """A submit without an answer."""

    submit: SubmitRequest
    follower: Follower | None
    expires_at_us: int
    traceparent: str
    answer: asyncio.Future[SubmitResponse]
    sent: bool = False  # on the present stream, or an earlier one


@dataclass
class _Outbox:
    """What the next message will say, by name: the contents are looked up when it is made."""

    submits: dict[int, None] = field(default_factory=dict)
    follows: dict[str, None] = field(default_factory=dict)
    leaves: dict[str, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.submits or self.follows or self.leaves)


class Line:
    """Kept up by `run`, as long as the gateway lives. Everything else may be called at any time."""

    def __init__(
        self, gateway: str, where: Whereabouts, dial: Dial, clock: Clock, on_change: OnChange
    ) -> None:
        """`gateway` names this process. `on_change(address)` hears of each new leader, and "" when
        the line is down."""
        self._gateway = gateway
        self._where = where
        self._dial = dial
        self._clock = clock
        self._on_change = on_change
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._given_up: dict[int, str] = {}  # sent, unanswered, its caller gone: call -> follower
        self._followers = FollowerIndex()
        self._outbox = _Outbox()
        self._said: asyncio.Event = asyncio.Event()  # the outbox was changed, or a beat is due
        self._called: asyncio.Event = asyncio.Event()  # there is a submit without an answer
        self._emptied: asyncio.Event = asyncio.Event()  # all that was said is on its way
        self._open = False  # a stream is there, or being opened
        self._heard_us = 0
        self.leader = ""  # address; empty while the line is down
        self.term = 0

    @property
    def followers(self) -> int:
        """Followers that have not left."""
        return len(self._followers)

    @property
    def unanswered(self) -> int:
        """Submits that wait for an answer."""
        return len(self._calls)

    async def submit(
        self,
        submit: SubmitRequest,
        follower: Follower | None,
        wait_us: int,
        traceparent: str = "",
    ) -> SubmitResponse:
        """Control's answer, which also makes `follower` follow the request that answers.

        Raises ControlUnavailable when none came within `wait_us`. Cancelling it takes the follower
        back. A submit that was never sent leaves no trace.
        """
        number = next(self._numbers)
        answer: asyncio.Future[SubmitResponse] = asyncio.get_running_loop().create_future()
        expires_at_us = self._clock.now_us() + wait_us
        self._calls[number] = _Call(submit, follower, expires_at_us, traceparent, answer)
        self._called.set()
        self._outbox.submits[number] = None
        self._say()
        try:
            return await answer
        except asyncio.CancelledError:
            if follower is not None:  # whom an answer of this very moment has made a follower
                self.leave(follower, returns=True)
            raise
        finally:
            self._give_up(number)

    def follow(self, follower: Follower) -> None:
        """From now on `follower.next` gives what happens to its request behind its cursor."""
        follower.awaits = True
        self._followers.add(follower)
        self._outbox.follows[follower.name] = None
        self._say()

    def leave(self, follower: Follower, *, returns: bool) -> None:
        """The follower goes, expected back or not. Calling it twice is no error."""
        unsaid = follower.name in self._outbox.follows
        self._outbox.follows.pop(follower.name, None)
        if self._followers.remove(follower) and self._open and not unsaid:
            self._outbox.leaves[follower.name] = returns
            self._say()

    async def run(self) -> None:
        """Keeps the line up until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._expire())
            failures = 0
            while True:
                address = self._where.next()
                heard = bool(address) and await self._session(address)
                failures = 0 if heard else min(failures + 1, len(_BACKOFF_US) - 1)
                await self._clock.sleep_until(self._clock.now_us() + _BACKOFF_US[failures])

    async def emptied(self) -> None:
        """Returns when everything said so far is on its way; at once while the line is down."""
        if self._open:
            await self._emptied.wait()

    async def _session(self, address: str) -> bool:
        """One stream from its opening to its end; whether anything was heard on it."""
        self._heard_us = self._clock.now_us()
        link, heard = None, False

        async def talk() -> None:
            nonlocal link
            link = await self._dial(address)
            self._say_all_again()
            await _until_one_fails(self._send(link), self._receive(link, address), self._beat())

        try:
            await _until_one_fails(self._watch_silence(), talk())
        except LinkBroken as broken:
            level = logging.WARNING if self.leader else logging.DEBUG
            log.log(level, "line to control at %s: %s", address, broken)
            if broken.leader:
                self._where.hint(broken.leader)
            heard = bool(self.leader)
        finally:
            self._down()
            if link is not None:
                await link.close()
        return heard

    async def _send(self, link: Link) -> None:
        message = AttachRequest(gateway=self._gateway)
        while True:
            self._said.clear()
            self._gather(message)
            next_us = self._clock.now_us() + GATHER_US
            await link.send(message)
            if not self._outbox:
                self._emptied.set()
                await self._said.wait()
                await self._clock.sleep_until(next_us)
            message = AttachRequest()

    async def _receive(self, link: Link, address: str) -> None:
        while True:
            message = await link.receive()
            self._heard_us = self._clock.now_us()
            if self.leader != address:
                self.leader, self.term = address, message.term
                log.info("the line to control at %s stands (term %d)", address, message.term)
                self._on_change(address)
            self._take(message)

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep_until(self._clock.now_us() + BEAT_US)
            self._said.set()

    async def _watch_silence(self) -> None:
        while (due_us := self._heard_us + SILENCE_US_MAX) > self._clock.now_us():
            await self._clock.sleep_until(due_us)
        raise LinkBroken(f"nothing was heard for {SILENCE_US_MAX / 1e6:g} s")

    async def _expire(self) -> None:
        while True:
            if not self._calls:
                self._called.clear()
                await self._called.wait()
            await self._clock.sleep_until(self._clock.now_us() + _EXPIRY_CHECK_US)
            now_us = self._clock.now_us()
            for call in tuple(self._calls.values()):
                if call.expires_at_us <= now_us and not call.answer.done():
                    call.answer.set_exception(ControlUnavailable())

    def _take(self, message: AttachResponse) -> None:
        for answered in message.answers:
            self._answer(answered.call, answered.answer)
        for followed in message.followed:
            if (follower := self._followers.get(followed.follower)) is not None:
                follower.told(followed)
        for event in message.events:
            for follower in self._followers.of(event.request_id):
                follower.put(event)

    def _answer(self, number: int, answer: SubmitResponse) -> None:
        call = self._calls.pop(number, None)
        if call is None or call.answer.done():
            name = self._given_up.pop(number, "")
            if call is not None and call.follower is not None:  # it goes in this moment
                name = call.follower.name
            if name:
                self._outbox.leaves[name] = True  # the answer made it a follower
                self._say()
            return
        if call.follower is not None and not answer.HasField("rejected"):
            call.follower.request_id = answer.request_id or call.submit.request_id
            call.follower.awaits = call.follower.request_id != call.submit.request_id
            self._followers.add(call.follower)
        call.answer.set_result(answer)

    def _give_up(self, number: int) -> None:
        """The caller of a submit has its answer, or waits no longer."""
        call = self._calls.pop(number, None)
        self._outbox.submits.pop(number, None)
        if call is None or call.follower is None or not (call.sent and self._open):
            return
        self._outbox.leaves[call.follower.name] = True
        self._given_up[number] = call.follower.name
        if len(self._given_up) > _GIVEN_UP_MAX:
            del self._given_up[next(iter(self._given_up))]
        self._say()

    def _say(self) -> None:
        self._emptied.clear()
        self._said.set()

    def _gather(self, message: AttachRequest) -> None:
        now_us = self._clock.now_us()
        for number in self._next_submits():
            call = self._calls[number]
            if call.expires_at_us > now_us:
                call.sent = True
                message.submits.add(
                    call=number,
                    submit=call.submit,
                    expires_us=call.expires_at_us - now_us,
                    follower=call.follower.name if call.follower is not None else "",
                    traceparent=call.traceparent,
                )
        for name in _taken(self._outbox.follows, _FOLLOWS_A_MESSAGE):
            if (follower := self._followers.get(name)) is not None:
                message.follows.append(follower.as_follow())
        leaves, self._outbox.leaves = self._outbox.leaves, {}
        message.leaves.extend(Leave(follower=f, returns=back) for f, back in leaves.items())

    def _next_submits(self) -> list[int]:
        """Those that go in one message, taken out."""
        chosen, room = 0, _WORKFLOW_BYTES_A_MESSAGE
        for number in itertools.islice(self._outbox.submits, _SUBMITS_A_MESSAGE):
            submit = self._calls[number].submit
            room -= submit.workflow.ByteSize() if submit.HasField("workflow") else 0
            if chosen and room < 0:
                break
            chosen += 1
        return _taken(self._outbox.submits, chosen)

    def _say_all_again(self) -> None:
        self._outbox = _Outbox(
            submits=dict.fromkeys(self._calls), follows=dict.fromkeys(self._followers.names())
        )
        self._open = True
        self._say()

    def _down(self) -> None:
        # Whoever left, or gave a submit up, is gone with the stream: control saw it end.
        was, self.leader, self._open = self.leader, "", False
        self._given_up.clear()
        self._outbox.leaves.clear()
        self._emptied.set()
        if was:
            self._on_change("")


def _taken(names: dict[K, None], most: int) -> list[K]:
    """The first ones, taken out."""
    chosen = list(itertools.islice(names, most))
    for name in chosen:
        del names[name]
    return chosen


async def _until_one_fails(*work: Coroutine[Any, Any, None]) -> NoReturn:
    """Runs them until one raises; raises that, and a bug rather than a broken link.

    Not a task group: Python 3.11's forgets a cancel from outside when a task of its own failed too.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    errors = [error for t in tasks if not t.cancelled() and (error := t.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, LinkBroken)):
        raise error
    raise LinkBroken("the stream was cancelled")
