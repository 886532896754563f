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
        self._pending: queue.Queue[ReadableSpan | threading.Event | None] = queue.Queue(_QUEUE_MAX)
        self._hurry = threading.Event()  # somebody waits for what is pending
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._write_until_closed, name="spans", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        try:
            self._pending.put_nowait(span)
        except queue.Full:
            self.drops += 1

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Returns once every span ended so far is in the file; False when that took too long."""
        written = threading.Event()
        try:
            self._pending.put(written, timeout=timeout_millis / 1e3)
        except queue.Full:
            return False
        self._hurry.set()
        return written.wait(timeout_millis / 1e3)

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._pending.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
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
            self._write([item for item in batch if isinstance(item, ReadableSpan)])
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            if open_:
                self._hurry.wait(_PAUSE_S)
                self._hurry.clear()

    def _write(self, spans: list[ReadableSpan]) -> None:
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

    def _line(self, span: ReadableSpan) -> bytes:
        return msgspec.json.encode(self._record(span)) + b"\n"

    def _record(self, span: ReadableSpan) -> SpanRecord:
        context = span.get_span_context()
        assert context is not None, "an ended span has a context"
        status = span.status.status_code.name.lower()
        return SpanRecord(
            trace_id=f"{context.trace_id:032x}",
            span_id=f"{context.span_id:016x}",
            parent_id=f"{span.parent.span_id:016x}" if span.parent is not None else "",
            name=span.name,
            start_unix_ns=span.start_time or 0,
            end_unix_ns=span.end_time or 0,
            service=self._service,
            instance=self._instance,
            status=f"error: {span.status.description or ''}" if status == "error" else status,
            attributes=_plain(span.attributes),
            events=tuple(
                SpanEvent(name=e.name, at_unix_ns=e.timestamp, attributes=_plain(e.attributes))
                for e in span.events
            ),
        )


def _plain(attributes: Mapping[str, AnyValue] | None) -> dict[str, Attribute]:
    return {key: _plain_value(value) for key, value in (attributes or {}).items()}


def _plain_value(value: AnyValue) -> Attribute:
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [str(v) if not isinstance(v, int | float) else v for v in value]
    return str(value)
