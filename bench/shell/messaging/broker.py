"""A broker in memory: core messages at most once, streams and key-value buckets that outlive it.

It keeps the rules that the shell rests on: order per publisher and subscription, an append
refused when the stream moved, one message a subject, messages and keys that expire, and stamps of a
clock of its own, which no other clock agrees with. What goes wrong with it is said by the world:
stalls, restarts, cut connections, and the weather (`wire.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from ..loop import SimulatedLoop
from ..wire import Weather, Wire

SECOND_US = 1_000_000
DELIVERY = "_DELIVERY."  # subjects of what consumers get
INBOX = "_INBOX."  # subjects of answers: INBOX, the client, a number
_UNIX_US = 1_900_000_000 * SECOND_US


class Message(NamedTuple):
    """One message of a stream or on its way to a subscriber."""

    subject: str
    data: bytes
    reply: str = ""
    sequence: int = 0
    unix_us: int = 0  # the broker's stamp
    headers: Mapping[str, str] | None = None


class WrongLast(Exception):
    """An append expected another last sequence than the stream has."""

    def __init__(self, last: int) -> None:
        super().__init__(f"the last sequence is {last}")
        self.last = last


@dataclass
class Stream:
    """A stream; also the store of a key-value bucket, whose keys are subjects."""

    subjects: tuple[str, ...]
    one_a_subject: bool
    age_us: int = 0  # of a message when it goes; 0: it stays
    marks: bool = False  # what has gone by age leaves an empty message for a while
    bounds: tuple[int, float, int] = (-1, 0.0, 1)  # bytes, age in s, copies: told, not obeyed
    messages: dict[int, Message] = field(default_factory=dict)  # by sequence, ascending
    newest: dict[str, int] = field(default_factory=dict)  # sequence by subject
    last: int = 0
    appended: list[Message] = field(default_factory=list)  # all there ever were, for the checks
    followers: list[Callable[[Message], None]] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # of messages that are stored once

    def get(self, subject: str) -> Message | None:
        sequence = self.newest.get(subject)
        return None if sequence is None else self.messages[sequence]

    def matching(self, pattern: str) -> list[Message]:
        """Stored messages on such subjects, oldest first; "" is all."""
        if self.one_a_subject and pattern and "*" not in pattern and ">" not in pattern:
            newest = self.get(pattern)
            return [] if newest is None else [newest]
        fits = matcher(pattern or ">")
        return [m for m in self.messages.values() if fits(m.subject)]

    def remove(self, subject: str, before: int | None = None) -> None:
        """Purges a subject, of what came before that sequence."""
        for message in self.matching(subject):
            if before is not None and message.sequence >= before:
                continue
            del self.messages[message.sequence]
            self.newest.pop(message.subject, None)


@dataclass
class Interest:
    """A subscription as the broker knows it."""

    pattern: str
    connection: Connection
    deliver: Callable[[Message], None]


class Connection:
    """A client's two wires to the broker."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.name = name
        self.up = Wire(broker.loop, broker.rng, broker.weather)
        self.down = Wire(broker.loop, broker.rng, broker.weather)
        self.on_reset: Callable[[], None] = _nothing

    def hold(self) -> None:
        """A partition that TCP survives: everything comes later."""
        self.up.hold()
        self.down.hold()

    def release(self) -> None:
        self.up.release()
        self.down.release()


class Broker:
    """All there is of it: subscriptions, streams, buckets, connections."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random, weather: Weather) -> None:
        self.loop = loop
        self.rng = rng
        self.weather = weather
        self.skew_us = rng.randrange(-(10**9), 10**9)
        self.streams: dict[str, Stream] = {}
        self.connections: list[Connection] = []
        self.down = False
        self.lost = 0  # core messages that were dropped
        self.taps: list[Callable[[Message], None]] = []  # hear every core message
        self._interests: dict[int, Interest] = {}
        self._exact: dict[str, dict[int, Interest]] = {}
        self._wild: dict[int, Interest] = {}
        self._wild_found: dict[str, list[Interest]] = {}  # by subject
        self._stream_names: dict[str, str | None] = {}
        self._ids = 0
        self._stalled = False

    # ------------------------------------------------------------------------------------------
    # what the world does to it

    def stall(self) -> None:
        """SIGSTOP: connections stand, nothing is read."""
        if not self._stalled:
            self._stalled = True
            for connection in self.connections:
                connection.up.hold()

    def go_on(self) -> None:
        if self._stalled:
            self._stalled = False
            for connection in tuple(self.connections):
                connection.up.release()

    def crash(self) -> None:
        """kill -9: streams and buckets stay, connections and what was under way do not."""
        self.go_on()
        self.down = True
        for connection in tuple(self.connections):
            self.reset(connection)

    def start(self) -> None:
        self.down = False

    def reset(self, connection: Connection) -> None:
        """Ends one connection; what was under way on it is lost."""
        if connection in self.connections:
            self.connections.remove(connection)
            if self._stalled:
                connection.up.release()
        self.lost += connection.up.cut() + connection.down.cut()
        for number in [n for n, i in self._interests.items() if i.connection is connection]:
            self.unsubscribe(number)
        connection.on_reset()

    def connect(self, name: str) -> Connection | None:
        """A new connection; None while the broker is down or stalled."""
        if self.down or self._stalled:
            return None
        connection = Connection(self, name)
        self.connections.append(connection)
        return connection

    # ------------------------------------------------------------------------------------------
    # core messages

    @property
    def subscriptions(self) -> int:
        return len(self._interests)

    def subscribe(self, interest: Interest) -> int:
        self._ids += 1
        self._interests[self._ids] = interest
        if "*" in interest.pattern or ">" in interest.pattern:
            self._wild[self._ids] = interest
            self._wild_found.clear()
        else:
            self._exact.setdefault(interest.pattern, {})[self._ids] = interest
        return self._ids

    def unsubscribe(self, number: int) -> None:
        interest = self._interests.pop(number, None)
        if interest is None:
            return
        if self._wild.pop(number, None) is not None:
            self._wild_found.clear()
        else:
            subject = interest.pattern
            self._exact[subject].pop(number, None)
            if not self._exact[subject]:
                del self._exact[subject]

    def publish(self, message: Message, sender: Connection | None = None) -> int:
        """Hands a message to every subscriber, and to streams of its subject; returns to how many
        subscribers.
        """
        stored = None if message.subject[0] == "_" else self.stream_of(message.subject)
        if stored is not None:
            self.append(self.streams[stored], message.subject, message.data)
        for tap in self.taps:
            tap(message)
        subject = message.subject
        inbox = subject.startswith(INBOX)
        found = list(self._exact.get(subject.rpartition(".")[0] if inbox else subject, {}).values())
        if self._wild and not inbox:
            found += self._wild_of(subject)
        for interest in found:
            for _ in range(self._copies(message)):
                interest.connection.down.send(interest.deliver, message)
        return len(found)

    def _wild_of(self, subject: str) -> list[Interest]:
        if subject not in self._wild_found:
            found = [i for i in self._wild.values() if matcher(i.pattern)(subject)]
            self._wild_found[subject] = found
        return self._wild_found[subject]

    def deliver(self, message: Message, subject: str) -> bool:
        """Hands a consumer's message to whoever listens on its delivery subject, under the subject
        that it was stored with; whether anybody does.
        """
        found = tuple(self._exact.get(message.subject, {}).values())
        if found and self._copies(message):
            _, data, reply, sequence, unix_us, headers = message
            named = Message(subject, data, reply, sequence, unix_us, headers)
            for interest in found:
                interest.connection.down.send(interest.deliver, named)
        return bool(found)

    def _copies(self, message: Message) -> int:
        weather = self.weather
        if message.subject.startswith(INBOX):
            return 1  # an answer that is lost is the weather's `lost_answer`
        if message.subject.startswith(DELIVERY) and not weather.drop:
            return 1
        if weather.drop and self.rng.random() < weather.drop:
            self.lost += 1
            return 0
        return 2 if weather.duplicate and self.rng.random() < weather.duplicate else 1

    # ------------------------------------------------------------------------------------------
    # streams

    @property
    def unix_us(self) -> int:
        """The broker's wall clock."""
        return _UNIX_US + self.loop.now_us + self.skew_us

    def stream(self, name: str, made: Callable[[], Stream]) -> Stream:
        """The stream of that name, made where needed."""
        if name not in self.streams:
            self.streams[name] = made()
            self._stream_names.clear()
        return self.streams[name]

    def stream_of(self, subject: str) -> str | None:
        """Name of the stream that takes a subject."""
        if subject not in self._stream_names:
            patterns = ((n, p) for n, s in self.streams.items() for p in s.subjects)
            found = (name for name, pattern in patterns if matcher(pattern)(subject))
            self._stream_names[subject] = next(found, None)
        return self._stream_names[subject]

    def all_of(self, name: str) -> list[Message]:
        """Everything that a stream ever took."""
        return self.streams[name].appended if name in self.streams else []

    def all_messages(self) -> list[Message]:
        """Everything that all streams ever took."""
        return [message for stream in self.streams.values() for message in stream.appended]

    def append(
        self,
        stream: Stream,
        subject: str,
        data: bytes,
        *,
        after: int | None = None,
        guard: tuple[str, int] | None = None,
        ttl_us: int = 0,
    ) -> Message:
        """Stores a message. `guard`: a subject and the sequence of what is newest there.

        Raises: WrongLast.
        """
        if after is not None and after != stream.last:
            raise WrongLast(stream.last)
        if guard is not None and (found := stream.newest.get(guard[0], 0)) != guard[1]:
            raise WrongLast(found)
        stream.last += 1
        message = Message(subject, data, "", stream.last, self.unix_us)
        if stream.one_a_subject and (old := stream.newest.get(subject)) is not None:
            del stream.messages[old]
        stream.messages[stream.last] = message
        stream.newest[subject] = stream.last
        stream.appended.append(message)
        if life_us := ttl_us or stream.age_us:
            end_us = self.loop.now_us + life_us
            self.loop.at_us(end_us, self._expire, stream, message, bool(data))
        for follower in tuple(stream.followers):
            follower(message)
        return message

    def _expire(self, stream: Stream, message: Message, leaves_mark: bool) -> None:
        if message.sequence not in stream.messages:
            return
        del stream.messages[message.sequence]
        if stream.newest.get(message.subject) == message.sequence:
            del stream.newest[message.subject]
            if stream.marks and leaves_mark:
                self.append(stream, message.subject, b"")


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[str], bool]:
    """NATS wildcards: "*" is one token, ">" at the end one or more."""
    parts = pattern.split(".")
    if pattern == ">":
        return lambda subject: True
    if "*" not in parts:
        if parts[-1] != ">":
            return pattern.__eq__
        return lambda subject: subject.startswith(pattern[:-1]) and len(subject) >= len(pattern)

    def fits(subject: str) -> bool:
        tokens = subject.split(".")
        if len(tokens) < len(parts) or (len(tokens) > len(parts) and parts[-1] != ">"):
            return False
        return all(p in ("*", ">", token) for p, token in zip(parts, tokens, strict=False))

    return fits


def _nothing() -> None:
    """Nobody minds."""
