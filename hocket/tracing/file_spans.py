"""A tracer for processes whose spans go to the local file and nowhere else.

OpenTelemetry's SDK takes 60 to 80 µs for a span, here it is a tenth: no sampler, no resource, no
processors, and of a span that is over when it is recorded no object at all. Callers see
OpenTelemetry's API either way; `telemetry.setup` takes the SDK where an exporter is configured.
"""

from __future__ import annotations

import random
import re
import secrets
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes, AttributeValue

from hocket.clock import unix_ns
from hocket.tracing.span_file import EndedSpan, SpanEvent, SpanFile, plain

_TRACEPARENT = re.compile(r"^(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_EVENTS_MAX = 128  # a span; later ones are dropped
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class OwnIds(IdGenerator):
    """Ids from a generator of this process's own.

    The SDK draws ids from `random`, which a worker may seed to make a model's run repeatable; and
    the system, asked for each, lets go of the interpreter.
    """

    def __init__(self) -> None:
        self._random = random.Random(secrets.randbits(128))

    def generate_span_id(self) -> int:
        return self._random.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        return self._random.getrandbits(128) or 1

    def is_trace_id_random(self) -> bool:
        return True


class FileTracer(trace.Tracer):
    """Spans of one process, each recorded whatever its caller's sampling flag says."""

    def __init__(self, file: SpanFile) -> None:
        self._file = file
        self._ids = OwnIds()

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: object = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> FileSpan:
        """`kind` and `links` have no place in the file."""
        parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid:
            trace_id, parent_id = parent.trace_id, f"{parent.span_id:016x}"
        else:
            trace_id, parent_id = self._ids.generate_trace_id(), ""
        made = SpanContext(
            trace_id, self._ids.generate_span_id(), False, _SAMPLED, parent.trace_state
        )
        start_ns = unix_ns() if start_time is None else start_time
        return FileSpan(self._file, name, made, parent_id, start_ns, attributes)

    @contextmanager
    def start_as_current_span(  # type: ignore[override]  # OpenTelemetry's own decorator differs
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: object = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> Iterator[trace.Span]:
        span = self.start_span(name, context, kind, attributes, links, start_time)
        with trace.use_span(span, end_on_exit, record_exception, set_status_on_exception):
            yield span

    def record(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        parent: str,
        attributes: Mapping[str, AttributeValue],
        error: str,
    ) -> str:
        """A span that is over, under a W3C traceparent (else a trace of its own); its own one."""
        found = _TRACEPARENT.match(parent)
        trace_id, parent_id = (found[1], found[2]) if found else ("", "")
        if trace_id in ("", _NO_TRACE) or parent_id == _NO_SPAN:
            trace_id, parent_id = f"{self._ids.generate_trace_id():032x}", ""
        span_id = f"{self._ids.generate_span_id():016x}"
        status = f"error: {error}" if error else "unset"
        ids = trace_id, span_id, parent_id
        self._file.put(EndedSpan(*ids, name, start_ns, end_ns, status, attributes, ()))
        return f"00-{trace_id}-{span_id}-01"


class FileTracers(trace.TracerProvider):
    """Gives one tracer to whoever asks."""

    def __init__(self, file: SpanFile) -> None:
        self._tracer = FileTracer(file)

    def get_tracer(self, *_: Any, **__: Any) -> FileTracer:
        return self._tracer


class FileSpan(trace.Span):
    """One span, in the file once it ends. What is said of it later is ignored."""

    def __init__(
        self,
        file: SpanFile,
        name: str,
        context: SpanContext,
        parent_id: str,
        start_ns: int,
        attributes: Attributes,
    ) -> None:
        self._file = file
        self._name = name
        self._context = context
        self._parent_id = parent_id
        self._start_ns = start_ns
        self._attributes: dict[str, AttributeValue] = dict(attributes) if attributes else {}
        self._events: list[SpanEvent] = []
        self._status = Status()
        self._is_over = False

    def get_span_context(self) -> SpanContext:
        return self._context

    def is_recording(self) -> bool:
        return not self._is_over

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        if not self._is_over:
            self._attributes.update(attributes)

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        if not self._is_over:
            self._attributes[key] = value

    def add_event(
        self, name: str, attributes: Attributes = None, timestamp: int | None = None
    ) -> None:
        if self._is_over or len(self._events) >= _EVENTS_MAX:
            return
        at_ns = unix_ns() if timestamp is None else timestamp
        told = plain(attributes) if attributes else {}
        self._events.append(SpanEvent(name=name, at_unix_ns=at_ns, attributes=told))

    def update_name(self, name: str) -> None:
        if not self._is_over:
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """OK stands whatever comes later, as OpenTelemetry has it."""
        if self._is_over or self._status.status_code is StatusCode.OK:
            return
        told = status if isinstance(status, Status) else Status(status, description)
        if told.status_code is not StatusCode.UNSET:
            self._status = told

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        told: dict[str, AttributeValue] = {
            "exception.type": type(exception).__qualname__,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
            **(attributes or {}),
        }
        self.add_event("exception", told, timestamp)

    def end(self, end_time: int | None = None) -> None:
        if self._is_over:
            return
        self._is_over = True
        end_ns = unix_ns() if end_time is None else end_time
        status = "unset"
        if self._status.status_code is not StatusCode.UNSET:
            status = self._status.status_code.name.lower()
            if status == "error":
                status = f"error: {self._status.description or ''}"
        made = self._context
        self._file.put(
            EndedSpan(
                f"{made.trace_id:032x}",
                f"{made.span_id:016x}",
                self._parent_id,
                self._name,
                self._start_ns,
                end_ns,
                status,
                self._attributes,
                tuple(self._events),
            )
        )
