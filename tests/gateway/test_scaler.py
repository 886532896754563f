"""KEDA's scaler while control cannot be heard, and behind API keys."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from gateway.access import Access
from gateway.cluster import ClusterWatch
from gateway.error_statuses import ErrorStatuses
from gateway.grpc_link import Doors
from gateway.scaler import METRIC, KedaScaler
from hocket.clock import ManualClock
from hocket.keda.externalscaler_pb2 import GetMetricsRequest, ScaledObjectRef
from hocket.keda.externalscaler_pb2_grpc import (
    ExternalScalerStub,
    add_ExternalScalerServicer_to_server,
)
from hocket.security import api_keys
from hocket.v1.control_pb2 import WatchClusterResponse


async def test_no_number_without_control_and_no_answer_without_a_key(tmp_path: Path) -> None:
    async def ready(_: bool) -> None:
        """Nobody listens."""

    doors, keys = Doors([], None), tmp_path / "keys"
    _, secret = api_keys.add(keys, "platform")
    server = grpc.aio.server(interceptors=[ErrorStatuses()])
    scaler = KedaScaler(ClusterWatch(doors, ready), Access(keys, ManualClock()))
    add_ExternalScalerServicer_to_server(scaler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        keda = ExternalScalerStub(channel)

        async def refused(name: str, **metadata: str) -> grpc.StatusCode:
            asker = ScaledObjectRef(scalerMetadata=metadata)
            asked = GetMetricsRequest(scaledObjectRef=asker, metricName=name)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await keda.GetMetrics(asked)
            return caught.value.code()

        assert await refused(METRIC, gpu="g") is grpc.StatusCode.UNAUTHENTICATED
        known = {"gpu": "g", "apiKeyFromEnv": secret}
        assert await refused(METRIC, **known) is grpc.StatusCode.UNAVAILABLE
        assert await refused("other", **known) is grpc.StatusCode.INVALID_ARGUMENT
        spec = await keda.GetMetricSpec(ScaledObjectRef(scalerMetadata=known))
        assert spec.metricSpecs[0].metricName == METRIC
    await server.stop(None)
    await doors.close()


class Said:
    """What control said last."""

    def __init__(self, state: WatchClusterResponse) -> None:
        self.fresh = state

    async def heard(self) -> None:
        """Nothing more is said."""


async def test_no_number_from_a_leader_that_has_not_heard_its_workers_yet() -> None:
    """Not even the trigger's own least one: the workers that are there are more."""
    state = WatchClusterResponse(pools_settling=True)
    server = grpc.aio.server(interceptors=[ErrorStatuses()])
    scaler = KedaScaler(Said(state), Access(None, ManualClock()))
    add_ExternalScalerServicer_to_server(scaler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        keda = ExternalScalerStub(channel)
        asker = ScaledObjectRef(scalerMetadata={"model": "m", "minWorkers": "1"})
        asked = GetMetricsRequest(scaledObjectRef=asker, metricName=METRIC)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await keda.GetMetrics(asked)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        state.pools_settling = False
        assert (await keda.GetMetrics(asked)).metricValues[0].metricValue == 1
    await server.stop(None)
