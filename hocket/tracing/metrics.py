"""Gauges of one process, sent by OTLP every minute where an endpoint is set; else nowhere.

A gauge is read when it is sent: what reads it has to be cheap, and may run in another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from hocket.config import otlp_metrics_endpoint


class GaugeValue(NamedTuple):
    """One value, with what it is about: few different names, never a request's."""

    value: float
    about: Mapping[str, str]


class Gauges:
    """A process's gauges; made by `setup`, ended by `close`."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self._provider = provider

    def add(
        self, name: str, unit: str, what: str, read: Callable[[], Iterable[GaugeValue]]
    ) -> None:
        """A gauge that `read` gives the values of."""
        if self._provider is None:
            return

        def observed(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(each.value, each.about) for each in read()]

        meter = self._provider.get_meter("hocket")
        meter.create_observable_gauge(name, callbacks=[observed], unit=unit, description=what)

    def close(self) -> None:
        """Sends the last values and stops. Calling it twice is no error."""
        if self._provider is not None:
            self._provider.shutdown()
            self._provider = None


def setup(resource: Resource) -> Gauges:
    """Gauges that go where OpenTelemetry's own settings say."""
    if not otlp_metrics_endpoint():
        return Gauges(None)
    provider = MeterProvider([_reader()], resource=resource, shutdown_on_exit=False)
    return Gauges(provider)


def _reader() -> MetricReader:
    # Imported only when used: the exporter costs 20 MB and starts gRPC.
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (  # noqa: PLC0415
        OTLPMetricExporter,
    )

    return PeriodicExportingMetricReader(OTLPMetricExporter())
