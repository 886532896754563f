"""Control replicas of a test, in its process or in their own, and a worker that only beats."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from control import service
from control.config import ControlSettings
from hocket.clock import SystemClock
from hocket.errors import HocketError, from_rpc_error
from hocket.launching import endpoints
from hocket.messaging.bus import Bus, Subjects
from hocket.tracing import telemetry
from hocket.v1 import control_pb2, control_pb2_grpc, generation_pb2, mesh_pb2, types_pb2
from tests.waiting import until

TTL_US = 1_000_000
MODEL = "m"
# Of a broker that all tests of a session share: what is reserved for one is no other's.
ROOM: dict[str, object] = {"media_bytes_max": 64 << 20, "inputs_bytes_max": 64 << 20}
_BEAT_S = 0.1


class Replica:
    """`service.serve` in a task."""

    def __init__(self, url: str, cluster: str, state_dir: Path, **settings: object) -> None:
        self.state_dir = state_dir
        self.settings = ControlSettings(
            cluster=cluster,
            nats_url=url,
            state_dir=state_dir,
            policy="edf",
            leader_ttl_us=TTL_US,
            **{**ROOM, **settings},  # type: ignore[arg-type]
        )
        self._stop = asyncio.Event()
        self._told = telemetry.setup("control", "test", state_dir, "warning")
        self.serving = asyncio.ensure_future(
            service.serve(self.settings, SystemClock(), self._told, self._stop)
        )

    async def leads(self) -> str:
        """Its address, once it leads."""
        await until(lambda: self.serving.done() or endpoints.find(self.state_dir, "control"))
        if self.serving.done():
            self.serving.result()
        found = endpoints.find(self.state_dir, "control")
        assert found is not None
        return found.address

    async def stop(self) -> None:
        self._stop.set()
        await self.serving
        self._told.close()


@asynccontextmanager
async def replica(url: str, cluster: str, at: Path, **settings: object) -> AsyncIterator[Replica]:
    """One that is stopped at the end, unless it has been."""
    made = Replica(url, cluster, at, **settings)
    try:
        yield made
    finally:
        if not made.serving.done():
            await made.stop()


def started(url: str, cluster: str, state_dir: Path, listen: str) -> subprocess.Popen[bytes]:
    """`python -m control`."""
    command = [sys.executable, "-m", "control", "--policy=edf", f"--nats-url={url}"]
    command += [f"--cluster={cluster}", f"--state-dir={state_dir}", f"--listen={listen}"]
    room = {f"HOCKET_{name.upper()}": str(size) for name, size in ROOM.items()}
    environment = {**os.environ, **room, "HOCKET_LEADER_TTL_US": str(TTL_US)}
    return subprocess.Popen(command, env=environment)


async def beat_for_ever(
    bus: Bus,
    subjects: Subjects,
    worker: str = "w0",
    model: generation_pb2.ModelInfo | None = None,
    operations: Sequence[str] = (),
) -> None:
    """A worker with nothing to do; `operations`: those without weights."""
    model = model or generation_pb2.ModelInfo(name=MODEL)
    sequence = 0
    while True:
        sequence += 1
        beat = mesh_pb2.Heartbeat(
            worker=worker,
            incarnation="1",
            sequence=sequence,
            host="h",
            models=[model],
            operations=operations,
        )
        beat.device.kind = beat.device.profile_name = "cpu"
        await bus.publish(subjects.heartbeat(worker), beat)
        await asyncio.sleep(_BEAT_S)


class Asking:
    """A client of one replica's door."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.stub = control_pb2_grpc.ControlServiceStub(self._channel)

    async def submit(self, request: str) -> control_pb2.SubmitResponse | HocketError:
        spec = types_pb2.GenerationSpec(
            model=MODEL, steps=4, shape=types_pb2.Shape(width=64, height=64), seed=1
        )
        wish = generation_pb2.GenerateRequest(spec=spec)
        try:
            return await self.stub.Submit(
                control_pb2.SubmitRequest(request_id=request, request=wish), timeout=20
            )
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)

    async def accepted(self, request: str) -> None:
        """Asks until it is."""
        while True:
            answer = await self.submit(request)
            if isinstance(answer, control_pb2.SubmitResponse) and answer.HasField("accepted"):
                return
            await asyncio.sleep(0.05)

    async def cancel(self, request: str) -> bool | HocketError:
        try:
            asked = control_pb2.CancelRequestRequest(request_id=request)
            return (await self.stub.CancelRequest(asked, timeout=20)).was_running
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)

    async def cluster(self) -> control_pb2.WatchClusterResponse:
        async for told in self.stub.WatchCluster(control_pb2.WatchClusterRequest(), timeout=20):
            return told
        raise AssertionError("nothing was told")

    async def cluster_with(
        self, holds: Callable[[control_pb2.WatchClusterResponse], bool]
    ) -> control_pb2.WatchClusterResponse:
        """The cluster's state once that holds of it."""
        while True:
            try:
                told = await self.cluster()
            except grpc.aio.AioRpcError:
                continue  # nobody leads just now
            if holds(told):
                return told
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[Asking]:
    client = Asking(address)
    try:
        yield client
    finally:
        await client.close()
