"""The whole mesh, as `hocket up` starts it: real processes, broker, model and sockets."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from bench.replay import entries_from_broker, replay
from gpuworker.measuring.reference import Reference
from hocket.client import HocketClient
from hocket.errors import InvalidRequest
from hocket.launching import endpoints
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.tracing import spans
from hocket.tracing.span_file import SpanRecord, read_spans
from hocket.v1.generation_pb2 import Accepted, Finished, GenerateRequest, MediaChunk, Progress
from hocket.v1.types_pb2 import GenerationSpec, Shape, Slo
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "a fox on a green background"
GUIDANCE = 2.0
WAIT_S = 120.0
STEPS_LONG = 60


class Called:
    """What one Generate call brought."""

    def __init__(self) -> None:
        self.accepted: Accepted | None = None
        self.steps: list[Progress] = []
        self.media = bytearray()
        self.finished: Finished | None = None
        self.denoising = asyncio.Event()  # set after the third denoising step

    @property
    def picture(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(bytes(self.media))))

    async def run(self, client: HocketClient, request: GenerateRequest) -> Called:
        async with asyncio.timeout(WAIT_S):
            async for event in client.generate(request):
                if isinstance(event, Accepted):
                    self.accepted = event
                elif isinstance(event, Progress):
                    self.steps.append(event)
                    if event.node == "dit" and event.step >= 3:
                        self.denoising.set()
                elif isinstance(event, MediaChunk):
                    self.media += event.data
                elif isinstance(event, Finished):
                    self.finished = event
        return self


def asked(side: int, steps: int, seed: int, deadline_s: float = 0.0) -> GenerateRequest:
    return GenerateRequest(
        spec=GenerationSpec(
            prompt=PROMPT,
            shape=Shape(width=side, height=side),
            steps=steps,
            seed=seed,
            guidance_scale=GUIDANCE,
        ),
        slo=Slo(deadline_us=int(deadline_s * 1e6)),
    )


def plain_picture(side: int, steps: int, seed: int) -> np.ndarray:
    reference = Reference.load()
    tokens, _ = reference.denoise(PROMPT, side, seed, steps, GUIDANCE)
    return reference.decode(tokens, side).numpy()


def levels_apart(ours: np.ndarray, theirs: np.ndarray) -> int:
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mesh")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(state_dir: Path) -> AsyncIterator[RunningMesh]:
    plan = MeshPlan(state_dir=state_dir, workers=4, log_level="warning")
    async with mesh(plan, lambda _: None) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(running: RunningMesh) -> AsyncIterator[HocketClient]:
    async with HocketClient(running.gateway) as connected:
        yield connected


async def test_three_sizes_at_once_give_the_pictures_of_the_plain_loop(
    client: HocketClient,
) -> None:
    sides = (64, 128, 256)
    calls = await asyncio.gather(
        *(Called().run(client, asked(side, 8, side, 60.0)) for side in sides)
    )
    for side, call in zip(sides, calls, strict=True):
        assert call.finished is not None and call.finished.on_time
        told = [p.step for p in call.steps if p.node == "dit"]  # short steps are told of together
        assert told == sorted(set(told)) and told[-1] == 8
        assert levels_apart(call.picture, plain_picture(side, 8, side)) <= 1


async def test_a_request_is_one_trace_down_to_each_step(
    client: HocketClient, state_dir: Path
) -> None:
    call = await Called().run(client, asked(64, 5, 1))
    assert call.accepted is not None
    wanted = {spans.GENERATE, spans.ADMIT, spans.QUEUE, spans.STEP}
    name = call.accepted.trace_id

    def recorded() -> list[SpanRecord]:
        return [s for s in read_spans(state_dir / "traces") if s.trace_id == name]

    def denoised(found: list[SpanRecord]) -> list[SpanRecord]:
        return [s for s in found if s.name == spans.STEP and s.attributes[spans.NODE] == "dit"]

    await until(lambda: {s.name for s in recorded()} >= wanted and len(denoised(recorded())) == 5)
    found = recorded()
    steps = denoised(found)
    assert sorted(int(str(s.attributes[spans.STEP_INDEX])) for s in steps) == [1, 2, 3, 4, 5]
    assert {s.service for s in found} == {"gateway", "control", "gpuworker"}
    for step in steps:
        assert step.attributes[spans.DEGREE] and step.attributes[spans.PREDICTED_US]


async def test_a_killed_worker_costs_steps_but_no_request_and_no_pixel(
    client: HocketClient, state_dir: Path
) -> None:
    """kill -9 while the request runs on it."""
    call = Called()
    task = asyncio.ensure_future(call.run(client, asked(128, STEPS_LONG, 5)))
    async with asyncio.timeout(WAIT_S):
        await call.denoising.wait()
    victim = call.steps[-1].workers[0]
    seen = len(call.steps)
    kill(state_dir, victim)  # its pool starts another process of this name, which may be used
    await task
    assert call.finished is not None
    assert [p for p in call.steps[seen:] if p.node == "dit"], "nothing ran after that"
    assert levels_apart(call.picture, plain_picture(128, STEPS_LONG, 5)) <= 1


async def test_a_worker_that_joins_late_is_used(
    client: HocketClient, running: RunningMesh, state_dir: Path
) -> None:
    command = [sys.executable, "-m", "gpuworker", "--name-prefix=w", "--first-index=9"]
    command += [f"--nats-url={running.nats_url}", f"--state-dir={state_dir}"]
    command += ["--log-level=warning"]
    late = await asyncio.create_subprocess_exec(*command)
    used: set[str] = set()
    try:
        async with asyncio.timeout(WAIT_S):
            while "w9" not in used:
                calls = await asyncio.gather(
                    *(Called().run(client, asked(64, 10, seed)) for seed in range(5))
                )
                used = {w for call in calls for p in call.steps for w in p.workers}
    finally:
        late.send_signal(signal.SIGTERM)
        assert await late.wait() == 0


async def test_a_malformed_request_is_refused_before_anything_is_queued(
    client: HocketClient,
) -> None:
    wrong = asked(100, 5000, 1)
    with pytest.raises(InvalidRequest) as refused:
        await Called().run(client, wrong)
    fields = {v.field for v in refused.value.violations}
    assert {"spec.steps"} <= fields and any(f.startswith("spec.shape") for f in fields)


async def test_rpc_deadline_and_slo_are_different_things(running: RunningMesh) -> None:
    """5 ms to listen, 5 s to finish: the RPC ends, an SLO of 5 s alone does not end it."""
    async with HocketClient(running.gateway) as connected:
        request = asked(128, STEPS_LONG, 1, deadline_s=5.0)
        with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
            async for _ in connected.generate(request, timeout_s=0.005):
                pass
        call = await Called().run(connected, asked(64, 5, 1, deadline_s=0.005))
        assert call.finished is not None and not call.finished.on_time


async def test_reflection_lists_the_services(running: RunningMesh) -> None:
    async with grpc.aio.insecure_channel(running.gateway) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asking = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [a async for a in stub.ServerReflectionInfo(iter([asking]))]
    names = {s.name for s in answers[0].list_services_response.service}
    assert {"hocket.v1.GenerationService", "grpc.health.v1.Health"} <= names


async def test_the_journal_replays_to_the_same_plans(running: RunningMesh) -> None:
    """Everything this module did, replayed; and one fact left out leads elsewhere."""
    entries = await entries_from_broker(running.nats_url, "local")
    found = replay(entries)
    assert found.agrees and found.plans > 10, found.differing
    arrival = next(e for e in entries if '"arrived"' in e.observed_json)
    arrival.observed_json = arrival.observed_json.replace('"width":', '"width":1')
    assert replay(entries).differing


async def test_a_broker_that_dies_and_comes_back_loses_no_request(
    client: HocketClient, running: RunningMesh
) -> None:
    """kill -9 of nats-server mid-request: everyone reconnects, what got lost is planned anew."""
    call = Called()
    task = asyncio.ensure_future(call.run(client, asked(128, STEPS_LONG, 7)))
    async with asyncio.timeout(WAIT_S):
        await call.denoising.wait()
    await killed_and_back(running, "nats")
    await task
    assert call.finished is not None
    assert levels_apart(call.picture, plain_picture(128, STEPS_LONG, 7)) <= 1


async def test_a_new_leader_takes_up_what_the_old_one_had_accepted(
    client: HocketClient, running: RunningMesh
) -> None:
    """kill -9 of control mid-request: the same call ends with the same picture."""
    call = Called()
    task = asyncio.ensure_future(call.run(client, asked(128, STEPS_LONG, 6)))
    async with asyncio.timeout(WAIT_S):
        await call.denoising.wait()
    await killed_and_back(running, "control")
    await task
    assert call.finished is not None
    assert levels_apart(call.picture, plain_picture(128, STEPS_LONG, 6)) <= 1
    entries = await entries_from_broker(running.nats_url, "local")
    started = next(e for e in reversed(entries) if e.HasField("leader_started")).leader_started
    assert '"hocket-emoji"' in started.latencies_json, "it knows what the old one had learned"
    assert replay(entries).agrees


async def killed_and_back(running: RunningMesh, name: str) -> None:
    """kill -9 of a child; returns once its supervisor has started it again."""
    child = next(one for one in running.children.all if one.name == name)
    pid = child.process.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: child.up.is_set() and child.process.pid != pid)


async def test_health_follows_the_leases(tmp_path: Path) -> None:
    """NOT_SERVING until a worker lives, and again after the last one is lost."""
    plan = MeshPlan(state_dir=tmp_path, workers=1, log_level="warning")
    states: list[int] = []
    async with (
        mesh(plan, lambda _: None) as small,
        grpc.aio.insecure_channel(small.gateway) as channel,
        asyncio.timeout(WAIT_S),
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async for answer in watch:
            states.append(answer.status)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                kill(tmp_path, "w0")
            elif health_pb2.HealthCheckResponse.SERVING in states:
                break
    assert states[-1] == health_pb2.HealthCheckResponse.NOT_SERVING


def kill(state_dir: Path, worker: str) -> None:
    """kill -9, by the process number that the worker wrote into the state folder."""
    found = endpoints.find(state_dir, worker)
    assert found is not None
    os.kill(found.pid, signal.SIGKILL)
