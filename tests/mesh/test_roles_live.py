"""Workers that hold one role each serve what whole ones serve; started as `hocket up --roles`."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from hocket.client import HocketClient
from hocket.errors import Refused
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.v1.control_pb2 import (
    DrainWorkerRequest,
    WatchClusterRequest,
    WatchClusterResponse,
    WorkerStatus,
)
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import GenerateRequest, Progress
from hocket.v1.types_pb2 import GenerationSpec, Shape
from tests.mesh.test_whole_mesh import killed_and_back

WAIT_S = 120.0
ROLES = (("text",), ("dit",), ("dit",), ("vae",))
WORKFLOWS = ("", "", "two-pass", "two-pass")


def asked(seed: int, workflow: str = "", steps: int = 8) -> GenerateRequest:
    spec = GenerationSpec(
        model="hocket-emoji",
        prompt="a fox on a green background",
        shape=Shape(width=64, height=64),
        steps=steps,
        seed=seed,
        guidance_scale=2.0,
        workflow=workflow,
    )
    return GenerateRequest(spec=spec)


async def files(client: HocketClient) -> list[bytes]:
    calls = (client.generate_media(asked(n, name)) for n, name in enumerate(WORKFLOWS))
    return [content for content, _ in await asyncio.gather(*calls)]


class Steps:
    """One request, and who ran it."""

    def __init__(self) -> None:
        self.workers: dict[str, set[str]] = {}  # by node
        self.denoises = asyncio.Event()
        self.media = b""

    async def run(self, client: HocketClient, request: GenerateRequest) -> None:
        async for event in client.generate(request):
            if isinstance(event, Progress):
                self.workers.setdefault(event.node, set()).update(event.workers)
                if event.node == "dit":
                    self.denoises.set()


async def workers(stub: ControlServiceStub) -> AsyncIterator[dict[str, WorkerStatus]]:
    async for state in stub.WatchCluster(WatchClusterRequest()):
        assert isinstance(state, WatchClusterResponse)
        yield {worker.name: worker for worker in state.workers}


@asynccontextmanager
async def whole_worker(running: RunningMesh, state_dir: Path) -> AsyncIterator[str]:
    """One more worker, with all roles."""
    command = [sys.executable, "-m", "gpuworker", "--name-prefix=w", "--first-index=9"]
    command += [f"--nats-url={running.nats_url}", f"--state-dir={state_dir}", "--log-level=warning"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield "w9"
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_roles_apart_make_the_files_of_a_whole_worker_and_lose_nothing(
    tmp_path: Path,
) -> None:
    # Nothing is split, so that files are equal to the bit.
    plan = MeshPlan(
        tmp_path, workers=4, policy="fixed-1", pools=4, roles=ROLES, log_level="warning"
    )
    async with (
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        grpc.aio.insecure_channel(running.control) as channel,
        asyncio.timeout(WAIT_S),
    ):
        stub = ControlServiceStub(channel)
        ours = await files(client)
        resident = await anext(workers(stub))
        assert {n: {p.node for p in w.memory.parts} for n, w in resident.items()} == {
            f"w{i}": set(roles) for i, roles in enumerate(ROLES)
        }
        for worker in resident.values():  # nothing but its role's lies on its device
            held = {part.part: part.size_bytes for part in worker.memory.parts}
            assert worker.memory.weights_bytes == sum(held.values()) > 0
        await lost_and_back(running, client, stub)
        async with whole_worker(running, tmp_path) as name:
            async for known in workers(stub):
                if name in known:
                    break
            for i in range(len(ROLES)):
                await stub.DrainWorker(DrainWorkerRequest(worker=f"w{i}"))
            assert await files(client) == ours


async def lost_and_back(
    running: RunningMesh, client: HocketClient, stub: ControlServiceStub
) -> None:
    """The only encoder is killed under load."""
    calls = [Steps() for _ in range(4)]
    tasks = [
        asyncio.ensure_future(call.run(client, asked(seed, steps=30)))
        for seed, call in enumerate(calls)
    ]
    await calls[0].denoises.wait()
    back = asyncio.ensure_future(killed_and_back(running, "workers"))
    late = Steps()  # while nobody encodes
    tasks.append(asyncio.ensure_future(late.run(client, asked(9))))
    await asyncio.gather(back, *tasks[:-1])
    try:
        await tasks[-1]
    except Refused as refused:
        assert refused.reason == "ROLES_NOT_SERVED" and "encode_prompt" in str(refused)
    for call in calls:
        # A prompt that the worker had encoded before is recalled: no call is told of.
        assert call.workers.get("text", {"w0"}) == {"w0"} and call.workers["vae"] == {"w3"}
        assert call.workers["dit"] <= {"w1", "w2"}
