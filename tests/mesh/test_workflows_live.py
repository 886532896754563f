"""Requests that are calls on artifacts, live: torch workers, two gateways, two replicas of control
and a broker. The files are those of the same calls made in one process, byte for byte, whatever is
killed or drained on the way; and of the calls only those are made again whose results were lost.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from bench.chaos.calls_made import MadeCall, again, by_node, made_calls, needless
from bench.chaos.strikes import cluster_state
from bench.replay import entries_from_broker, replay
from hocket.client import HocketClient
from hocket.errors import Refused, RequestFailed
from hocket.launching import endpoints
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.request_options import request
from hocket.tracing.span_file import read_spans
from hocket.v1.control_pb2 import DrainWorkerRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import Accepted, Finished, GenerateRequest, MediaChunk, Progress
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.files import read_file
from hocket.workflows.shipped import shipped
from tests.mesh.one_process import OneProcess
from tests.waiting import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

WAIT_S = 180.0
SIDE = 128
SEVERAL = """
description = "Three passes, of which the second one changes a part of the picture alone"
output = "media.media"
[inputs]
prompt = { type = "text" }
negative_prompt = { type = "text", optional = true }
mask = { type = "file" }
[[nodes]]
id = "text"
op = "encode_prompt"
inputs = { prompt = "$prompt", negative_prompt = "$negative_prompt" }
[[nodes]]
id = "small"
op = "denoise"
inputs = { embeddings = "text.embeddings" }
settings = { scale = 0.5, steps = 4 }
[[nodes]]
id = "sketch"
op = "decode"
inputs = { latents = "small.latents" }
settings = { scale = 0.5 }
[[nodes]]
id = "enlarge"
op = "resize"
inputs = { image = "sketch.image" }
settings = { method = "bicubic" }
[[nodes]]
id = "encode"
op = "encode_image"
inputs = { image = "enlarge.image" }
[[nodes]]
id = "where"
op = "load_mask"
inputs = { mask = "$mask" }
[[nodes]]
id = "part"
op = "denoise"
inputs = { embeddings = "text.embeddings", latents = "encode.latents", mask = "where.mask" }
settings = { strength = 0.8, seed_offset = 3 }
[[nodes]]
id = "whole"
op = "denoise"
inputs = { embeddings = "text.embeddings", latents = "part.latents" }
settings = { strength = 0.3, seed_offset = 5 }
[[nodes]]
id = "decode"
op = "decode"
inputs = { latents = "whole.latents" }
[[nodes]]
id = "media"
op = "make_media"
inputs = { image = "decode.image" }
"""


class Called:
    """What a Generate call has brought so far."""

    def __init__(self) -> None:
        self.accepted = Accepted()
        self.told: list[Progress] = []
        self.media = bytearray()
        self.finished: Finished | None = None
        self.inside = asyncio.Event()  # some steps into the pass that is waited for

    async def run(self, client: HocketClient, asked: GenerateRequest, node: str = "") -> Called:
        async with asyncio.timeout(WAIT_S):
            async for event in client.generate(asked):
                if isinstance(event, Accepted):
                    self.accepted = event
                elif isinstance(event, Progress):
                    self.told.append(event)
                    if event.node == node and event.step >= 3:
                        self.inside.set()
                elif isinstance(event, MediaChunk):
                    self.media += event.data
                elif isinstance(event, Finished):
                    self.finished = event
        return self


def two_passes(steps: int, seed: int = 1, side: int = SIDE) -> GenerateRequest:
    size = (side, side)
    return request("a red fox", workflow="two-pass", shape=size, steps=steps, seed=seed)


@pytest.fixture(scope="module")
def reference() -> OneProcess:
    return OneProcess()


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workflows")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(state_dir: Path) -> AsyncIterator[RunningMesh]:
    plan = MeshPlan(
        state_dir,
        workers=3,
        policy="fixed-1",
        batch_max=1,
        log_level="warning",
        controls=2,
        gateways=2,
    )
    async with mesh(plan, lambda _: None) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(running: RunningMesh) -> AsyncIterator[HocketClient]:
    async with HocketClient(running.gateway) as connected:
        yield connected


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (200, 150)) -> bytes:
    """Of smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    kept = io.BytesIO()
    image.save(kept, "PNG")
    return kept.getvalue()


async def test_files_are_those_of_the_same_calls_in_one_process(
    client: HocketClient, reference: OneProcess, tmp_path: Path
) -> None:
    path = tmp_path / "several.toml"
    path.write_text(SEVERAL)
    files = {"image": picture(1), "mask": picture(2, "L")}
    names = {
        "image": (await client.put_input(files["image"])).name,
        "mask": (await client.put_input(files["mask"], mask=True)).name,
    }
    several = await client.register_workflow(read_file(path))
    asked: list[tuple[WorkflowSpec, Called]] = []
    async with asyncio.TaskGroup() as tasks:
        for spec in (*(shipped()[n] for n in ("two-pass", "img2img", "inpaint")), several):
            wanted = request(
                "a red fox",
                workflow=spec.name,
                inputs={i.name: names[i.name] for i in spec.inputs if i.name in names},
                shape=(SIDE, SIDE),
                steps=10,
                seed=11,
            )
            call = Called()
            asked.append((spec, call))
            tasks.create_task(call.run(client, wanted))
    for spec, call in asked:
        effective = call.accepted.effective_spec
        assert effective.workflow == f"{spec.name}@{spec.digest[:16]}"
        wanted_files = {i.name: files[i.name] for i in spec.inputs if i.name in files}
        assert bytes(call.media) == reference.file(spec, effective, wanted_files), spec.name
        # A prompt that the worker had encoded before is recalled: no call is told of.
        told = {told.node for told in call.told} | {"text"}
        assert told == {node.id for node in spec.nodes}, spec.name
        assert call.told[-1].node == "media"


async def test_a_watcher_at_another_gateway_a_key_and_a_cancel(
    client: HocketClient, running: RunningMesh, state_dir: Path, reference: OneProcess
) -> None:
    content = picture(3)
    names = [(await client.put_input(each)).name for each in (content, picture(4))]
    asked = [
        request(
            "a cat",
            workflow="img2img",
            inputs={"image": name},
            shape=(SIDE, SIDE),
            steps=20,
            seed=2,
            idempotency_key="one",
        )
        for name in names
    ]
    made = await client.create(asked[0])
    async with HocketClient(running.gateways[1]) as other:
        events = [event async for event, _ in other.watch(made.request_id, timeout_s=WAIT_S)]
        assert isinstance(events[-1], Finished)
        spec = made.metadata.accepted.effective_spec
        expected = reference.file(shipped()["img2img"], spec, {"image": content})
        assert await other.result(made.request_id) == expected
        assert (await other.create(asked[0])).request_id == made.request_id
        with pytest.raises(Refused) as refused:
            await other.create(asked[1])
    assert refused.value.reason == "IDEMPOTENCY_KEY_REUSED"
    call = Called()
    following = asyncio.ensure_future(call.run(client, two_passes(100), "denoise"))
    await call.inside.wait()
    assert await client.cancel(call.accepted.request_id)
    with pytest.raises(RequestFailed, match="cancelled"):
        await following
    await nothing_is_held(state_dir)


async def test_a_killed_worker_costs_what_it_alone_held(
    client: HocketClient, state_dir: Path, reference: OneProcess
) -> None:
    """kill -9 of a worker in the second pass of several requests."""

    async def kill(worker: str) -> None:
        found = endpoints.find(state_dir, worker)
        assert found is not None
        os.kill(found.pid, signal.SIGKILL)

    calls, victim = await struck(client, kill, seeds=range(20, 24), steps=24)
    made = await recorded(state_dir, calls)
    assert again(made) and not needless(made, victim)
    files_are_right(calls, reference)
    await nothing_is_held(state_dir)


async def test_a_killed_leader_costs_no_call(
    client: HocketClient, state_dir: Path, reference: OneProcess
) -> None:
    """The next one goes on from what workers hold."""

    async def kill(_: str) -> None:
        found = endpoints.find(state_dir, "control")
        assert found is not None
        os.kill(found.pid, signal.SIGKILL)

    calls, _ = await struck(client, kill, seeds=range(30, 32), steps=40)
    assert again(await recorded(state_dir, calls)) == []
    files_are_right(calls, reference)
    await nothing_is_held(state_dir)


async def test_a_drained_worker_costs_no_call(
    client: HocketClient, state_dir: Path, reference: OneProcess
) -> None:
    async def drain(worker: str, undo: bool = False) -> None:
        found = endpoints.find(state_dir, "control")
        assert found is not None
        async with grpc.aio.insecure_channel(found.address) as channel:
            stub = ControlServiceStub(channel)
            await stub.DrainWorker(DrainWorkerRequest(worker=worker, undo=undo))

    calls, worker = await struck(client, drain, seeds=range(40, 42), steps=24)
    assert again(await recorded(state_dir, calls)) == []
    files_are_right(calls, reference)
    await drain(worker, undo=True)
    await nothing_is_held(state_dir)


async def struck(
    client: HocketClient,
    strike: Callable[[str], Awaitable[None]],
    seeds: Sequence[int],
    steps: int,
) -> tuple[list[Called], str]:
    """Two passes for each seed, and a strike when the first of them is in the second one; the
    worker that is told to it ran that pass."""
    calls = [Called() for _ in seeds]
    async with asyncio.TaskGroup() as tasks:
        for call, seed in zip(calls, seeds, strict=True):
            tasks.create_task(call.run(client, two_passes(steps, seed), "denoise"))
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait(
                [tasks.create_task(call.inside.wait()) for call in calls],
                return_when=asyncio.FIRST_COMPLETED,
            )
        (worker,) = next(call for call in calls if call.inside.is_set()).told[-1].workers
        await strike(worker)
    return calls, worker


async def recorded(state_dir: Path, calls: Sequence[Called]) -> list[MadeCall]:
    """Every call that was made for these requests."""
    requests = [call.accepted.request_id for call in calls]

    def made() -> list[MadeCall]:
        return made_calls(read_spans(state_dir / "traces"), requests)

    await until(lambda: by_node(made()).get("media", 0) >= len(calls))
    return made()


def files_are_right(calls: Sequence[Called], reference: OneProcess) -> None:
    for call in calls:
        spec = call.accepted.effective_spec
        assert bytes(call.media) == reference.file(shipped()["two-pass"], spec, {})


async def nothing_is_held(state_dir: Path) -> None:
    """Returns once no worker holds an artifact."""
    async with asyncio.timeout(WAIT_S):
        while await held_bytes(state_dir) != 0:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.1)


async def held_bytes(state_dir: Path) -> int:
    """Of all artifacts on all workers; -1 while nobody leads."""
    found = endpoints.find(state_dir, "control")
    state = await cluster_state(found.address) if found is not None else None
    if state is None:
        return -1
    memories = [worker.memory for worker in state.workers]
    return sum(m.latents_bytes + m.latents_host_bytes + m.latents_file_bytes for m in memories)


async def test_the_journal_replays_to_the_same_plans(running: RunningMesh) -> None:
    """All that the newest leader did, workflows among it."""
    found = replay(await entries_from_broker(running.nats_url, "local"))
    assert found.agrees and found.plans > 10, found.differing
