"""The local copy of every span: one JSON object a line.

A span that ends is put on a bounded queue and written by a thread of its own, at most twenty times
a second: each time takes the interpreter from whoever runs steps. A caller never waits for the
disk. When the queue is full the span is dropped and counted. The file is
rotated once (`.1.jsonl`).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.util.types import AnyValue

log = logging.getLogger(__name__)

_QUEUE_MAX = 65_536
_CLOSE_S = 2.0
_PAUSE_S = 0.05
FILE_BYTES_MAX = 64 << 20

Attribute = str | bool | int | float | list[str | bool | int | float]
_PLAIN = (str, bool, int, float)


class SpanEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened within a span."""

    name: str
    at_unix_ns: int
    attributes: dict[str, Attribute] = {}


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the file."""

    trace_id: str  # 32 hex digits
    span_id: str  # 16 hex digits
    parent_id: str  # empty for a root
    name: str
    start_unix_ns: int
    end_unix_ns: int
    service: str
    instance: str
    status: str = "unset"  # "unset", "ok" or "error: why"
    attributes: dict[str, Attribute] = {}
    events: tuple[SpanEvent, ...] = ()


class EndedSpan(NamedTuple):
    """What the writer makes a line of; fields as in SpanRecord."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_unix_ns: int
    end_unix_ns: int
    status: str
    attributes: Mapping[str, AnyValue]
    events: tuple[SpanEvent, ...]


def read_spans(folder: Path) -> list[SpanRecord]:
    """All spans in the files of a `traces` folder, by start. A torn last line is skipped."""
    decode = msgspec.json.Decoder(SpanRecord).decode
    spans: list[SpanRecord] = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                spans.append(decode(line))
            except msgspec.DecodeError:
                continue  # the line that its process was writing when it was killed
    spans.sort(key=lambda span: (span.start_unix_ns, span.end_unix_ns))
    return spans


_Item: TypeAlias = ReadableSpan | EndedSpan | threading.Event | None


class SpanFile(SpanProcessor):
    """Writes spans to a file, soon, from a thread of its own."""

    def __init__(
        self, path: Path, service: str, instance: str, bytes_max: int = FILE_BYTES_MAX
    ) -> None:
        self.drops = 0  # spans lost because the disk could not keep up
        self._path = path
        self._service = service
        self._instance = instance
        self._bytes_max = bytes_max
        self._pending: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._encode = msgspec.json.Encoder().encode
        self._hurry = threading.Event()  # somebody waits for what is pending
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._write_until_closed, name="spans", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        self.put(span)

    def put(self, span: ReadableSpan | EndedSpan) -> None:
        """Writes it soon; drops it where too many wait."""
        if self._pending.qsize() < _QUEUE_MAX:
            self._pending.put(span)
        else:
            self.drops += 1

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Returns once every span ended so far is in the file; False when that took too long."""
        written = threading.Event()
        self._pending.put(written)
        self._hurry.set()
        return written.wait(timeout_millis / 1e3)

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._pending.put(None)
        self._hurry.set()
        self._thread.join(_CLOSE_S)
        if self.drops:
            log.warning("%d spans were not written to %s", self.drops, self._path)

    def _write_until_closed(self) -> None:
        open_ = True
        while open_:
            batch = [self._pending.get()]
            while len(batch) < _QUEUE_MAX:
                try:
                    batch.append(self._pending.get_nowait())
                except queue.Empty:
                    break
            open_ = None not in batch
            self._write([item for item in batch if isinstance(item, ReadableSpan | EndedSpan)])
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            if open_:
                self._hurry.wait(_PAUSE_S)
                self._hurry.clear()

    def _write(self, spans: list[ReadableSpan | EndedSpan]) -> None:
        if not spans:
            return
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(self._line(span) for span in spans))
                full = file.tell() > self._bytes_max
            if full:
                self._path.replace(self._path.with_suffix(".1.jsonl"))
        except OSError as error:
            self.drops += len(spans)
            log.warning("cannot write spans to %s: %s", self._path, error)

    def _line(self, span: ReadableSpan | EndedSpan) -> bytes:
        ended = span if isinstance(span, EndedSpan) else _ended(span)
        record = SpanRecord(
            trace_id=ended.trace_id,
            span_id=ended.span_id,
            parent_id=ended.parent_id,
            name=ended.name,
            start_unix_ns=ended.start_unix_ns,
            end_unix_ns=ended.end_unix_ns,
            service=self._service,
            instance=self._instance,
            status=ended.status,
            attributes=plain(ended.attributes),
            events=ended.events,
        )
        return self._encode(record) + b"\n"


def plain(attributes: Mapping[str, AnyValue] | None) -> dict[str, Attribute]:
    """Attributes as the file has them: without what says nothing, other kinds as text."""
    return {
        key: value if type(value) in _PLAIN else _plain_value(value)  # type: ignore[misc]
        for key, value in (attributes or {}).items()
        if value is not None
    }


def _ended(span: ReadableSpan) -> EndedSpan:
    context = span.get_span_context()
    assert context is not None, "an ended span has a context"
    status = span.status.status_code.name.lower()
    return EndedSpan(
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        f"{span.parent.span_id:016x}" if span.parent is not None else "",
        span.name,
        span.start_time or 0,
        span.end_time or 0,
        f"error: {span.status.description or ''}" if status == "error" else status,
        span.attributes or {},
        tuple(
            SpanEvent(name=e.name, at_unix_ns=e.timestamp, attributes=plain(e.attributes))
            for e in span.events
        ),
    )


def _plain_value(value: AnyValue) -> Attribute:
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [str(v) if not isinstance(v, int | float) else v for v in value]
    return str(value)
