"""Spans leave by OTLP when an endpoint is set: a real collector's gRPC service takes them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

from hocket.tracing import telemetry


class Collector(service.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.services: set[str] = set()
        self.got = threading.Event()

    def Export(
        self, request: messages.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> messages.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for attribute in resource.resource.attributes:
                if attribute.key == "service.name":
                    self.services.add(attribute.value.string_value)
            self.names |= {s.name for scope in resource.scope_spans for s in scope.spans}
        self.got.set()
        return messages.ExportTraceServiceResponse()


def test_spans_reach_a_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    told = telemetry.setup("gateway", "0", tmp_path)
    with told.tracer.start_as_current_span("Generate"):
        pass
    told.close()
    assert collector.got.wait(30)
    server.stop(None).wait()
    assert collector.names == {"Generate"} and collector.services == {"gateway"}
