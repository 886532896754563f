"""Push consumers: what a stream delivers to a subject, with heartbeats, until nobody listens."""

from __future__ import annotations

from nats.js import api

from .broker import Broker, Message, Stream, matcher

_LAST = "Nats-Last-Consumer"


class Consumer:
    """One ephemeral consumer without acknowledgements."""

    def __init__(
        self, broker: Broker, name: str, stream: Stream, config: api.ConsumerConfig
    ) -> None:
        self._broker, self._name, self._stream = broker, name, stream
        self._subject = config.deliver_subject or ""
        self._wants = matcher(config.filter_subject or ">")
        self._beat_us = round((config.idle_heartbeat or 5.0) * 1e6)
        self._delivered = 0
        found = stream.matching(config.filter_subject or "")
        if config.deliver_policy is api.DeliverPolicy.LAST_PER_SUBJECT:
            found = [m for m in found if stream.newest.get(m.subject) == m.sequence]
        elif config.deliver_policy is api.DeliverPolicy.BY_START_SEQUENCE:
            found = [m for m in found if m.sequence >= (config.opt_start_seq or 0)]
        elif config.deliver_policy is api.DeliverPolicy.NEW:
            found = []
        self.pending = len(found)
        self._first = found

    def start(self) -> None:
        """Delivers what was there, and from then on what comes."""
        self._stream.followers.append(self._follow)
        for index, message in enumerate(self._first):
            self._deliver(message, len(self._first) - index - 1)
        self._first = []
        self._broker.loop.at_us(self._broker.loop.now_us + self._beat_us, self._beat)

    def _follow(self, message: Message) -> None:
        if self._wants(message.subject):
            self._deliver(message, 0)

    def _deliver(self, message: Message, pending: int) -> None:
        self._delivered += 1
        stamp_ns = message.unix_us * 1000
        reply = (
            f"$JS.ACK.{self._name}.c.1.{message.sequence}.{self._delivered}.{stamp_ns}.{pending}"
        )
        self._send(Message(self._subject, message.data, reply), told=message.subject)

    def _beat(self) -> None:
        beat = Message(self._subject, b"", headers={_LAST: str(self._delivered)})
        if self._send(beat, told=self._subject):
            self._broker.loop.at_us(self._broker.loop.now_us + self._beat_us, self._beat)

    def _send(self, message: Message, told: str) -> bool:
        """Whether somebody listens; the message names the subject that it was stored under."""
        heard = self._broker.deliver(message, told)
        if not heard and self._follow in self._stream.followers:
            self._stream.followers.remove(self._follow)
        return heard
