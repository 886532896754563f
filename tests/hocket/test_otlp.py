"""Spans and gauges leave by OTLP when an endpoint is set: a real collector's services take them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as meter_messages
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as meter_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

from hocket.tracing import metrics, telemetry


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


class MeterCollector(meter_service.MetricsServiceServicer):
    """Keeps the gauges that it is sent, by name and model."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}

    def Export(
        self, request: meter_messages.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> meter_messages.ExportMetricsServiceResponse:
        scopes = [s for r in request.resource_metrics for s in r.scope_metrics]
        for metric in (m for scope in scopes for m in scope.metrics):
            for point in metric.gauge.data_points:
                self.values[metric.name, point.attributes[0].value.string_value] = point.as_int
        return meter_messages.ExportMetricsServiceResponse()


def test_spans_and_gauges_reach_a_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, meters = Collector(), MeterCollector()
    server = grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(collector, server)
    meter_service.add_MetricsServiceServicer_to_server(meters, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    told = telemetry.setup("gateway", "0", tmp_path)
    told.gauges.add("wanted", "{worker}", "", lambda: [metrics.GaugeValue(3, {"model": "m"})])
    with told.tracer.start_as_current_span("Generate"):
        pass
    told.close()
    assert collector.got.wait(30)
    server.stop(None).wait()
    assert meters.values == {("wanted", "m"): 3}
    assert collector.names == {"Generate"} and collector.services == {"gateway"}
