"""Spans, logs and gauges of one process.

Every span goes to a local file (`hocket.tracing.span_file`), and by OTLP to wherever
OTEL_EXPORTER_OTLP_ENDPOINT points. Log lines go to stderr: one JSON object a line with the trace id
of the span they were written in, or plain text on a terminal. Nothing here is process-global but
the root logger's handler: the tracer is handed on, not looked up.

Call `setup` after a fork, never before: it starts a thread.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import msgspec
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from hocket.config import otlp_endpoint
from hocket.rpc.interceptors import Wrapping
from hocket.rpc.server_spans import ServerSpans
from hocket.rpc.server_streams import StreamsInOneTask
from hocket.tracing import metrics
from hocket.tracing.file_spans import FileTracer, FileTracers, OwnIds
from hocket.tracing.span_file import SpanFile

_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")
_CONTEXTS_KEPT = 256  # one request's spans come in a row
_W3C = TraceContextTextMapPropagator()


def setup(service: str, instance: str, state_dir: Path, log_level: str = "info") -> Telemetry:
    """Starts telemetry; spans go to `<state_dir>/traces/<service>-<instance>.jsonl`."""
    handler = _log_handler(service, instance)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(log_level.upper())
    file = SpanFile(state_dir / "traces" / f"{service}-{instance}.jsonl", service, instance)
    resource = Resource.create({"service.name": service, "service.instance.id": instance})
    provider = _exporting(resource, file) if otlp_endpoint() else FileTracers(file)
    tracer, gauges = provider.get_tracer("hocket"), metrics.setup(resource)
    return Telemetry(service, instance, tracer, provider, file, handler, gauges)


@dataclass(frozen=True)
class Telemetry:
    """What a process needs to trace; made by `setup`, ended by `close`."""

    service: str
    instance: str
    tracer: Tracer
    provider: trace.TracerProvider
    file: SpanFile
    log_handler: logging.Handler
    gauges: metrics.Gauges

    def server_wrappings(self, stall_s: float | None = None) -> list[Wrapping]:
        """Continue the caller's trace in each RPC served; `stall_s`: see `StreamsInOneTask`."""
        return [StreamsInOneTask(stall_s), ServerSpans(self.tracer, _is_a_request)]

    def client_interceptors(self) -> list[grpc.aio.ClientInterceptor]:
        """Hand the current trace on in each RPC made."""
        return client_interceptors(self.provider)

    def close(self) -> None:
        """Writes out what is pending and stops. Calling it twice is no error."""
        self.gauges.close()
        if isinstance(self.provider, TracerProvider):
            self.provider.shutdown()
        self.file.shutdown()
        logging.getLogger().removeHandler(self.log_handler)


def client_interceptors(
    provider: trace.TracerProvider | None = None,
) -> list[grpc.aio.ClientInterceptor]:
    """Hand the current trace on in each RPC made; `provider` defaults to the global one."""
    untyped: Any = aio_client_interceptors
    interceptors: list[grpc.aio.ClientInterceptor] = untyped(provider, filter_=_is_traced)
    return interceptors


def traceparent(context: Context | None = None) -> str:
    """The W3C traceparent of `context`, or of the current one; empty outside a span."""
    return traceparent_of(trace.get_current_span(context))


def traceparent_of(span: trace.Span) -> str:
    """The W3C traceparent of a span; empty where it is none."""
    made = span.get_span_context()
    told = f"00-{made.trace_id:032x}-{made.span_id:016x}-{made.trace_flags:02x}"
    return told if made.is_valid else ""


@functools.lru_cache(_CONTEXTS_KEPT)
def context_from(traceparent: str) -> Context:
    """The context that a W3C traceparent names; an empty one when it is empty or malformed."""
    return _W3C.extract({"traceparent": traceparent}, Context())


@contextmanager
def within(traceparent: str) -> Iterator[None]:
    """Makes a request's trace the current one, so that log lines written inside carry its id."""
    token = attach(context_from(traceparent))
    try:
        yield
    finally:
        detach(token)


def trace_id(traceparent: str) -> str:
    """The trace id in a W3C traceparent, 32 hex digits; empty when malformed."""
    match = _TRACEPARENT.match(traceparent)
    return match[1] if match else ""


def record_span(
    tracer: Tracer,
    name: str,
    *,
    start_ns: int,
    end_ns: int,
    parent: Context | str = "",
    attributes: Mapping[str, AttributeValue] | None = None,
    error: str = "",
) -> str:
    """Records a span that is already over, for work that reports late. Times are unix nanoseconds.

    Returns its traceparent, so that it can be the parent of another.
    """
    if isinstance(tracer, FileTracer):
        under = parent if isinstance(parent, str) else traceparent(parent)
        return tracer.record(name, start_ns, end_ns, under, attributes or {}, error)
    context = context_from(parent) if isinstance(parent, str) else parent
    span = tracer.start_span(name, context, attributes=attributes, start_time=start_ns)
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(end_ns)
    return traceparent_of(span)


class _CallDetails(Protocol):
    @property
    def method(self) -> str | bytes: ...


def _is_traced(call: _CallDetails) -> bool:
    method = call.method.decode() if isinstance(call.method, bytes) else call.method
    return _is_a_request(method)


def _is_a_request(method: str) -> bool:
    # Health, reflection, the standing watch, a gateway's line and KEDA are no part of any request.
    no_request = method.startswith(("/grpc.", "/externalscaler."))
    return not no_request and not method.endswith(("/WatchCluster", "/Attach"))


def _exporting(resource: Resource, file: SpanFile) -> TracerProvider:
    """OpenTelemetry's SDK: spans go to the file and to the collector."""
    # ALWAYS_ON: the local file keeps every request, whatever the caller's sampling flag says.
    provider = TracerProvider(
        resource=resource, sampler=ALWAYS_ON, id_generator=OwnIds(), shutdown_on_exit=False
    )
    provider.add_span_processor(file)
    provider.add_span_processor(_otlp_processor())
    return provider


def _otlp_processor() -> BatchSpanProcessor:
    # Imported only when used: the exporter costs 20 MB and starts gRPC.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )

    return BatchSpanProcessor(OTLPSpanExporter())


def _log_handler(service: str, instance: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        form = f"%(asctime)s %(levelname)-7s {service}-{instance}: %(message)s"
        handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    else:
        handler.setFormatter(_JsonFormatter(service, instance))
    return handler


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._service = service
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "service": self._service,
            "instance": self._instance,
            "logger": record.name,
            "message": record.getMessage(),
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = f"{span.trace_id:032x}"
            line["span_id"] = f"{span.span_id:016x}"
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
