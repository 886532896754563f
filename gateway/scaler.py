"""KEDA's external scaler, answered by any gateway from what the leader of control said last.

A trigger's metadata name what its workers serve:

    model        one of the models listed; absent: all models of a kind of GPU
    gpu          kind of GPU, as workers' profiles name it; absent: all kinds that serve the model
    minWorkers   least replicas, 0 or more; default 0
    maxWorkers   most replicas; default: control's own bound
    apiKeyFromEnv, apiKey   where the gateway asks for API keys: KEDA sends no headers

The metric is the number of workers wanted, its target 1. While control cannot be heard the answer
is UNAVAILABLE, never a number, and so it is while a new leader has not heard all workers yet: KEDA
then leaves the replicas as they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.callers import Callers
from gateway.error_statuses import Context
from hocket.errors import ControlUnavailable, InvalidRequest, Violation
from hocket.keda.externalscaler_pb2 import (
    GetMetricSpecResponse,
    GetMetricsRequest,
    GetMetricsResponse,
    IsActiveResponse,
    MetricSpec,
    MetricValue,
    ScaledObjectRef,
)
from hocket.keda.externalscaler_pb2_grpc import ExternalScalerServicer
from hocket.v1.control_pb2 import PoolStatus, WatchClusterResponse

METRIC = "hocket-workers-wanted"
_COUNT_MAX = 1_000_000
_KEYS = ("apiKeyFromEnv", "apiKey")
_FOUND_CHARS_MAX = 60


class ClusterState(Protocol):
    """What control says of the cluster."""

    @property
    def fresh(self) -> WatchClusterResponse:
        """Its last word. Raises ControlUnavailable while control cannot be heard."""

    async def heard(self) -> None:
        """Returns when control has said something more."""


@dataclass(frozen=True, slots=True)
class PoolSelector:
    """What a trigger asks about."""

    model: str
    gpu: str
    least: int
    most: int

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> PoolSelector:
        """Reads a trigger's metadata; keys of others are left alone. Raises InvalidRequest."""
        found: list[Violation] = []
        least = _count(metadata, "minWorkers", 0, found)
        most = _count(metadata, "maxWorkers", _COUNT_MAX, found)
        if not found and least > most:
            found.append(_violation("minWorkers", str(least), f"at most maxWorkers, {most}"))
        if found:
            raise InvalidRequest(tuple(found))
        return cls(metadata.get("model", ""), metadata.get("gpu", ""), least, most)

    def wanted(self, pools: Sequence[PoolStatus]) -> int:
        """Workers wanted, within the trigger's bounds. Raises InvalidRequest where nobody ever
        served this, and no `minWorkers` asks for the first one.
        """
        chosen = [p for p in pools if p.model == self.model and self.gpu in ("", p.gpu)]
        if not chosen and not self.least:
            raise InvalidRequest(tuple(self._unknown(pools)))
        return min(max(sum(pool.wanted for pool in chosen), self.least), self.most)

    def _unknown(self, pools: Sequence[PoolStatus]) -> list[Violation]:
        found = []
        for name, value, known in (
            ("model", self.model, {pool.model for pool in pools} - {""}),
            ("gpu", self.gpu, {pool.gpu for pool in pools if pool.model == self.model}),
        ):
            if value and value not in known:
                allowed = ", ".join(sorted(known)) or "none: no worker was seen yet"
                found.append(_violation(name, value, f"{allowed}; or minWorkers above 0"))
        return found or [_violation("gpu", self.gpu, "a kind of GPU that some worker has")]


class KedaScaler(ExternalScalerServicer):
    """Serves any number of ScaledObjects; keeps no state between calls."""

    def __init__(self, cluster: ClusterState, callers: Callers) -> None:
        self._cluster = cluster
        self._callers = callers

    async def IsActive(self, request: ScaledObjectRef, context: Context) -> IsActiveResponse:
        return IsActiveResponse(result=self._wanted(request, context) > 0)

    async def StreamIsActive(
        self, request: ScaledObjectRef, context: Context
    ) -> AsyncIterator[IsActiveResponse]:
        """Says nothing while a new leader has not heard all workers: what was told holds."""
        told: bool | None = None
        while True:
            if not self._cluster.fresh.pools_settling:
                active = self._wanted(request, context) > 0
                if active != told:
                    yield IsActiveResponse(result=active)
                told = active
            await self._cluster.heard()

    async def GetMetricSpec(
        self, request: ScaledObjectRef, context: Context
    ) -> GetMetricSpecResponse:
        self._selector(request, context)
        spec = MetricSpec(metricName=METRIC, targetSize=1, targetSizeFloat=1.0)
        return GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: GetMetricsRequest, context: Context) -> GetMetricsResponse:
        if request.metricName != METRIC:
            raise InvalidRequest((_violation_of("metricName", request.metricName, METRIC),))
        wanted = self._wanted(request.scaledObjectRef, context)
        value = MetricValue(metricName=METRIC, metricValue=wanted, metricValueFloat=wanted)
        return GetMetricsResponse(metricValues=[value])

    def _wanted(self, asker: ScaledObjectRef, context: Context) -> int:
        selector, state = self._selector(asker, context), self._cluster.fresh
        if state.pools_settling:
            raise ControlUnavailable("the leader has just begun and has not heard all workers yet")
        return selector.wanted(state.pools)

    def _selector(self, asker: ScaledObjectRef, context: Context) -> PoolSelector:
        """Raises NotAuthenticated, InvalidRequest."""
        metadata = asker.scalerMetadata
        keys = [("x-api-key", metadata[name]) for name in _KEYS if metadata.get(name)]
        self._callers.tenant([*(context.invocation_metadata() or ()), *keys])
        return PoolSelector.of(metadata)


def _count(metadata: Mapping[str, str], name: str, absent: int, violations: list[Violation]) -> int:
    text = metadata.get(name, "").strip() or str(absent)
    if text.isascii() and text.isdigit() and int(text[:8]) <= _COUNT_MAX and len(text) <= 8:
        return int(text)
    violations.append(_violation(name, text, f"a whole number, 0 to {_COUNT_MAX}"))
    return absent


def _violation(name: str, found: str, allowed: str) -> Violation:
    return _violation_of(f"scalerMetadata.{name}", found, allowed)


def _violation_of(field: str, found: str, allowed: str) -> Violation:
    return Violation(field, f"found {found[:_FOUND_CHARS_MAX]!r}; allowed: {allowed}")
