"""The part of nats-py's JetStream surface that the shell uses, over a simulated broker."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, BinaryIO

import nats.errors
from nats.js.api import ConsumerConfig, RawStreamMsg, StreamConfig
from nats.js.errors import APIError, KeyWrongLastSequenceError, NotFoundError

from .broker import Message, Stream, WrongLast, matcher
from .client import Client, Received
from .consumers import Consumer

_WRONG_LAST = 10071
_MESSAGE_ID = "Nats-Msg-Id"
_AFTER = "Nats-Expected-Last-Sequence"
_AFTER_ON_SUBJECT = "Nats-Expected-Last-Subject-Sequence"
_GUARDED = "Nats-Expected-Last-Subject-Sequence-Subject"
_TTL = "Nats-TTL"


@dataclass(frozen=True)
class Acknowledged:
    """The broker has stored a message."""

    stream: str
    seq: int
    duplicate: bool = False


class JetStream:
    """Streams, buckets and objects of one client."""

    def __init__(self, client: Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def add_stream(self, config: StreamConfig | None = None, **_: Any) -> None:
        assert config is not None and config.name is not None
        name = config.name
        made = partial(
            Stream,
            subjects=tuple(config.subjects or ()),
            one_a_subject=config.max_msgs_per_subject == 1,
            age_us=round((config.max_age or 0.0) * 1e6),
            marks=bool(config.subject_delete_marker_ttl),
        )
        await self._ask(lambda: void(self._client.broker.stream(name, made)))

    async def update_stream(self, config: StreamConfig | None = None, **_: Any) -> None:
        """Streams have one shape here, but for what is told of them."""
        assert config is not None and config.name is not None
        name, bounds = config.name, _bounds(config)
        await self._ask(lambda: setattr(self._stream(name), "bounds", bounds))

    async def purge_stream(
        self, name: str, seq: int | None = None, subject: str | None = None
    ) -> None:
        await self._ask(lambda: self._stream(name).remove(subject or ">", seq))

    async def get_last_msg(self, stream_name: str, subject: str, **_: Any) -> RawStreamMsg:
        return await self.get_msg(stream_name, subject=subject)

    async def get_msg(
        self,
        stream_name: str,
        seq: int | None = None,
        subject: str = "",
        direct: bool = False,
        next: bool = False,
    ) -> RawStreamMsg:
        """By number, the newest on a subject, or (`next`) the first there from a number on."""

        def get() -> Message | None:
            stream = self._stream(stream_name)
            if seq is not None and not next:
                return stream.messages.get(seq)
            found = [m for m in stream.matching(subject) if m.sequence >= (seq or 0)]
            return (found[0] if next else found[-1]) if found else None

        message = await self._ask(get)
        if message is None:
            raise NotFoundError(code=404, description="no message found")
        return RawStreamMsg(
            subject=message.subject,
            seq=message.sequence,
            data=message.data,
            time=datetime.datetime.fromtimestamp(message.unix_us / 1e6, datetime.UTC),
        )

    async def add_consumer(self, stream: str, config: ConsumerConfig | None = None) -> Any:
        assert config is not None

        def make() -> int:
            consumer = Consumer(self._client.broker, stream, self._stream(stream), config)
            # Its deliveries come behind the answer, as they do from a real one.
            self._client.broker.loop.at_us(self._client.broker.loop.now_us, consumer.start)
            return consumer.pending

        return SimpleNamespace(num_pending=await self._ask(make))

    async def stream_info(self, name: str, subjects_filter: str | None = None) -> Any:
        def info() -> Any:
            stream = self._stream(name)
            wanted = matcher(subjects_filter or ">")
            subjects = {s: 1 for s in stream.newest if wanted(s)}
            state = SimpleNamespace(
                subjects=subjects, last_seq=stream.last, messages=len(stream.messages)
            )
            size, age_s, copies = stream.bounds
            config = StreamConfig(name, max_bytes=size, max_age=age_s, num_replicas=copies)
            return SimpleNamespace(state=state, config=config)

        return await self._ask(info)

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float | None = None,
        stream: str | None = None,
        headers: Mapping[str, Any] | None = None,
        msg_ttl: float | None = None,
    ) -> Acknowledged:
        head = headers or {}

        def store() -> Acknowledged:
            name, found = self._stream_of(subject)
            known = found.ids.get(head.get(_MESSAGE_ID, ""))
            if known is not None:
                return Acknowledged(name, known, duplicate=True)
            try:
                message = self._client.broker.append(
                    found,
                    subject,
                    payload,
                    after=_number(head, _AFTER),
                    guard=_guard(head, subject),
                    ttl_us=_ttl_us(head, msg_ttl),
                )
            except WrongLast as error:
                raise _api_error(400, _WRONG_LAST, f"wrong last sequence: {error.last}") from error
            if _MESSAGE_ID in head:
                found.ids[head[_MESSAGE_ID]] = message.sequence
            return Acknowledged(name, message.sequence)

        if len(payload) > self._client.max_payload:
            raise nats.errors.MaxPayloadError
        timeout_s = self._timeout_s if timeout is None else timeout
        answer: Acknowledged = await self._client.ask(store, timeout_s, stores=True)
        return answer

    async def subscribe(self, subject: str, *, stream: str, **_: Any) -> Reader:
        """An ordered consumer from the first message on."""
        found: list[Message] = await self._ask(lambda: self._stream(stream).matching(subject))
        return Reader(self._client, found)

    async def create_key_value(self, config: Any = None, **options: Any) -> Bucket:
        name = options["bucket"] if config is None else config.bucket
        made = partial(Stream, (f"$KV.{name}.>",), True)
        await self._ask(lambda: void(self._client.broker.stream(f"KV_{name}", made)))
        return Bucket(self, self._client, name)

    async def key_value(self, name: str) -> Bucket:
        await self._ask(lambda: void(self._stream(f"KV_{name}")))
        return Bucket(self, self._client, name)

    async def object_store(self, name: str) -> Objects:
        await self._ask(lambda: void(self._stream(f"OBJ_{name}")))
        return Objects(self, self._client, name)

    async def create_object_store(self, name: str, config: Any = None) -> Objects:
        bounds = (-1, 0.0, 1)
        if config is not None:
            bounds = (config.max_bytes or -1, config.ttl or 0.0, config.replicas)
        made = partial(Stream, (), True, bounds=bounds)
        await self._ask(lambda: void(self._client.broker.stream(f"OBJ_{name}", made)))
        return Objects(self, self._client, name)

    async def _ask(self, work: Callable[[], Any]) -> Any:
        return await self._client.ask(work, self._timeout_s)

    def _stream(self, name: str) -> Stream:
        try:
            return self._client.broker.streams[name]
        except KeyError:
            raise NotFoundError(code=404, description=f"no stream {name}") from None

    def _stream_of(self, subject: str) -> tuple[str, Stream]:
        name = self._client.broker.stream_of(subject)
        if name is None:
            raise NotFoundError(code=404, description=f"no stream for {subject}")
        return name, self._client.broker.streams[name]


class Reader:
    """Messages that were there at the call, oldest first."""

    def __init__(self, client: Client, found: list[Message]) -> None:
        self._client = client
        self._left = list(reversed(found))

    async def next_msg(self, timeout: float = 1.0) -> Any:
        if not self._left:
            raise nats.errors.TimeoutError
        message = self._left.pop()
        numbers = f"1.{message.sequence}.1.{message.unix_us * 1000}.{len(self._left)}"
        return Received(self._client, message._replace(reply=f"$JS.ACK.s.c.{numbers}"))

    async def unsubscribe(self) -> None:
        self._left.clear()


class Bucket:
    """A key-value bucket."""

    def __init__(self, jetstream: JetStream, client: Client, name: str) -> None:
        self._jetstream = jetstream
        self._client = client
        self._name = name

    async def get(self, key: str) -> Any:
        message = await self._jetstream._ask(lambda: self._stream().get(self._subject(key)))
        if message is None:
            raise NotFoundError(code=404, description=f"no key {key}")
        return SimpleNamespace(key=key, value=message.data, revision=message.sequence)

    async def put(self, key: str, value: bytes) -> int:
        return await self._write(key, value, None)

    async def update(self, key: str, value: bytes, last: int | None = None) -> int:
        return await self._write(key, value, last or 0)

    async def _write(self, key: str, value: bytes, last: int | None) -> int:
        def write() -> int:
            broker = self._client.broker
            stream, subject = self._stream(), self._subject(key)
            try:
                guard = None if last is None else (subject, last)
                return broker.append(stream, subject, value, guard=guard).sequence
            except WrongLast as error:
                raise KeyWrongLastSequenceError(description=str(error)) from error

        revision: int = await self._client.ask(write, 5.0, stores=True)
        return revision

    def _stream(self) -> Stream:
        return self._client.broker.streams[f"KV_{self._name}"]

    def _subject(self, key: str) -> str:
        return f"$KV.{self._name}.{key}"


class Objects:
    """An object store: pieces on one subject, and a description that leads there (ADR-20)."""

    def __init__(self, jetstream: JetStream, client: Client, name: str) -> None:
        self._jetstream = jetstream
        self._client = client
        self._name = name

    async def put(self, name: str, content: BinaryIO | bytes, **_: Any) -> None:
        whole = content if isinstance(content, bytes) else content.read()
        client, nuid = self._client, self._client.new_inbox().rpartition("-")[2]

        def store() -> None:
            stream = client.broker.streams[f"OBJ_{self._name}"]
            before = stream.get(self._about(name))
            client.broker.append(stream, f"$O.{self._name}.C.{nuid}", whole)
            facts = json.dumps({"nuid": nuid, "size": len(whole)}).encode()
            client.broker.append(stream, self._about(name), facts)
            if before is not None:
                old = f"$O.{self._name}.C.{json.loads(before.data)['nuid']}"
                stream.remove(old)
                stream.messages.pop(before.sequence, None)

        await client.ask(store, 5.0, stores=True)

    async def get(self, name: str, writeinto: BinaryIO | None = None, **_: object) -> Any:
        about = await self._jetstream.get_last_msg(f"OBJ_{self._name}", self._about(name))
        nuid = json.loads(about.data or b"{}")["nuid"]
        found = await self._jetstream.get_last_msg(f"OBJ_{self._name}", f"$O.{self._name}.C.{nuid}")
        if writeinto is not None:
            writeinto.write(found.data or b"")
        return SimpleNamespace(data=found.data)

    def _about(self, name: str) -> str:
        return f"$O.{self._name}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _bounds(config: StreamConfig) -> tuple[int, float, int]:
    return config.max_bytes or -1, config.max_age or 0.0, config.num_replicas or 1


def _number(head: Mapping[str, Any], name: str) -> int | None:
    return int(head[name]) if name in head else None


def _guard(head: Mapping[str, Any], subject: str) -> tuple[str, int] | None:
    sequence = _number(head, _AFTER_ON_SUBJECT)
    return None if sequence is None else (head.get(_GUARDED, subject), sequence)


def _ttl_us(head: Mapping[str, Any], ttl_s: float | None) -> int:
    if ttl_s:
        return round(ttl_s * 1e6)
    text = str(head.get(_TTL, "0")).removesuffix("s")
    return round(float(text) * 1e6)


def _api_error(code: int, err_code: int, description: str) -> APIError:
    return APIError(code=code, err_code=err_code, description=description)


def void(_: object) -> None:
    """Takes a result that nobody wants."""
