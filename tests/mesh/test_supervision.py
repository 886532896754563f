"""`hocket up` starts again what died, each process on its own port. On the same mesh: KEDA's
client, while the only model's workers are gone and a request waits for them.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest

from bench.admission.tree import MODEL, profile_csv
from gateway.scaler import METRIC
from hocket.client import HocketClient
from hocket.errors import HocketError
from hocket.keda.externalscaler_pb2 import GetMetricsRequest, ScaledObjectRef
from hocket.keda.externalscaler_pb2_grpc import ExternalScalerStub
from hocket.launching import endpoints, mesh_file
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.launching.restarts import RestartRule
from hocket.v1.control_pb2 import WatchClusterRequest, WatchClusterResponse
from hocket.v1.control_pb2_grpc import ControlServiceStub
from tests.waiting import until

WAIT_S = 120.0


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeshPlan:
    """A mesh of emulated workers."""
    profile, config = tmp_path / "profile.csv", tmp_path / "mesh.toml"
    profile.write_text(profile_csv(step_us=1000))
    config.write_text(f"""
        [control]
        profiles = ["{profile}"]
        wake_models = true
        pool_idle_s = 0.5
        pool_quiet_s = 0.5
        [gpuworker]
        gpu = "emulated"
        """)
    monkeypatch.setenv("HOCKET_CONFIG", str(config))
    return MeshPlan(
        state_dir=tmp_path / "state",
        workers=2,
        executor="emulated",
        profile=str(profile),
        log_level="warning",
        restarts=RestartRule(first_s=0.05),
    )


async def draws(address: str) -> None:
    """Makes a picture; again and again, while the mesh is not ready."""
    async with asyncio.timeout(WAIT_S), HocketClient(address) as client:
        while True:
            try:
                await client.generate_media("x", model=MODEL, shape=(64, 64), steps=1)
                return
            except HocketError:
                await asyncio.sleep(0.05)


async def kill(running: RunningMesh, name: str) -> None:
    """kill -9 of a child; returns once it is there again."""
    child = next(one for one in running.children.all if one.name == name)
    pid = child.process.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: child.up.is_set() and child.process.pid != pid)


async def next_leader(control: grpc.aio.Channel) -> WatchClusterResponse:
    """What a replica that was started again says first, once it leads."""
    while True:
        try:
            return await ControlServiceStub(control).WatchCluster(WatchClusterRequest()).read()
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)


async def scales(running: RunningMesh) -> None:
    """Workers that do not beat are as good as gone: nobody stands in their way when they return."""
    (pool,) = (one.process.pid for one in running.children.all if one.name == "workers")
    asker = ScaledObjectRef(scalerMetadata={"model": MODEL, "gpu": "emulated", "maxWorkers": "2"})
    async with (
        asyncio.timeout(WAIT_S),
        grpc.aio.insecure_channel(running.gateway) as channel,
        grpc.aio.insecure_channel(running.control) as control,
    ):
        keda = ExternalScalerStub(channel)
        spec = (await keda.GetMetricSpec(asker)).metricSpecs[0]
        assert (spec.metricName, spec.targetSizeFloat) == (METRIC, 1.0)
        activity = keda.StreamIsActive(asker)
        while (await activity.read()).result:
            """Idle for half a second: no worker is wanted."""
        os.killpg(pool, signal.SIGSTOP)
        try:
            cluster = ControlServiceStub(control).WatchCluster(WatchClusterRequest())
            while (await cluster.read()).workers:
                """Their leases end."""
            await kill(running, "control")
            found = await next_leader(control)
            assert [(m.name, m.workers) for m in found.models] == [(MODEL, 0)]
            waits = asyncio.ensure_future(draws(running.gateway))
            assert (await activity.read()).result, "a request waits: the first worker is wanted"
            asked = GetMetricsRequest(scaledObjectRef=asker, metricName=METRIC)
            (value,) = (await keda.GetMetrics(asked)).metricValues
            assert 1 <= value.metricValueFloat <= 2
        finally:
            os.killpg(pool, signal.SIGCONT)
        await waits
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await keda.IsActive(ScaledObjectRef(scalerMetadata={"model": "nobody's"}))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert 'scalerMetadata.model: found "nobody\'s"; allowed: ' in str(caught.value.details())


async def test_every_process_that_is_killed_comes_back_where_it_was(plan: MeshPlan) -> None:
    told: list[str] = []
    async with mesh(plan, told.append) as running:
        for name in ("nats", "control", "gateway", "workers"):
            await kill(running, name)
            await draws(running.gateway)
        await scales(running)
        found = {one.name: one.restarts for one in mesh_file.read(plan.state_dir)}
        control = endpoints.find(plan.state_dir, "control")
        assert control is not None and control.address == running.control
    assert found == {"nats": 1, "control": 2, "gateway": 1, "workers": 1}
    for name in found:
        assert any(t.startswith(f"{name} was killed by SIGKILL; starts again") for t in told)
    assert mesh_file.read(plan.state_dir) == []
    assert endpoints.living(plan.state_dir, "gateway") == ()
