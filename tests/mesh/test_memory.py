"""Workers with little memory, as real processes on a real broker: the same pictures as with all the
memory in the world, weights that come and go, latents that are parked in files, and a worker that
outlives an allocation that failed.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Container, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.mesh.scripted_leader import WAIT_S, Leader, Piece, WorkerPool
from bench.replay import entries_from_broker, replay
from gpuworker.config import EMBEDDED_MODEL
from gpuworker.measuring.reference import Reference as PlainLoop
from hocket.client import HocketClient
from hocket.launching.launcher import MeshPlan, mesh
from hocket.messaging.bus import Bus
from hocket.tracing.span_file import SpanRecord, read_spans
from hocket.v1 import mesh_pb2, types_pb2
from hocket.v1.control_pb2 import WatchClusterRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import GenerateRequest
from tests.waiting import until
from tests.worker.tiny_models import Reference, wan_reference

STEPS = 6
MIB = 1 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The embedded model under two names; in files of different bytes, or else they would share."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        shutil.copytree(EMBEDDED_MODEL, folder / name)
        for file in (folder / name).glob("*/*.safetensors"):
            save_file(load_file(file), file, metadata={"format": "pt", "copy": name})
        card = json.loads((folder / name / "card.json").read_text())
        (folder / name / "card.json").write_text(json.dumps({**card, "name": name}))
    return str(folder / "a"), str(folder / "b")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny Wan that decodes any size in one piece, also larger ones than its family is for."""
    made = wan_reference(tmp_path_factory.mktemp("models") / "tiny-wan")
    card = Path(made.folder) / "card.json"
    limits = {"tiled_over_px": 1 << 30, "pixels_max": 1280 * 1280}
    card.write_text(json.dumps({**json.loads(card.read_text()), **limits}))
    return made


@dataclass
class Workers:
    """A pool of real workers, and a leader for each test."""

    pool: WorkerPool
    terms: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @asynccontextmanager
    async def led(self) -> AsyncIterator[Leader]:
        bus = await Bus.connect(self.pool.url, "leader")
        leader = Leader(bus, self.pool.cluster, next(self.terms))
        await leader.listen(self.pool.count)
        yield leader
        await bus.close()


@pytest.fixture(scope="module")
def all_models(models: tuple[str, ...], wan: Reference) -> tuple[str, ...]:
    return *models, wan.folder


@pytest.fixture(scope="module")
def wide(
    nats_url: str, all_models: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    """Two workers with all the memory they want."""
    state = tmp_path_factory.mktemp("wide")
    with WorkerPool(nats_url, "memory-wide", state, all_models, 2) as pool:
        yield Workers(pool)


@pytest.fixture(scope="module")
def narrow(
    nats_url: str, all_models: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    """Two workers with room for the weights of one of the two models, and for few latents."""
    state = tmp_path_factory.mktemp("narrow")
    options = ("--memory-mib=25", "--latents-mib=1")
    with WorkerPool(nats_url, "memory-narrow", state, all_models, 2, options) as pool:
        yield Workers(pool)


def spec(model: str, seed: int, side: int = 64, steps: int = STEPS) -> types_pb2.GenerationSpec:
    return types_pb2.GenerationSpec(
        model=model,
        prompt="a fox on a green background",
        shape=types_pb2.Shape(width=side, height=side, frames=1),
        steps=steps,
        guidance_scale=2.0,
        seed=seed,
    )


async def memory_of(
    leader: Leader, worker: str, enough: Callable[[types_pb2.Memory], bool]
) -> types_pb2.Memory:
    """What the worker's heartbeats say as soon as it is enough."""
    beats = await leader.bus.follow(leader.subjects.heartbeat(worker), mesh_pb2.Heartbeat)
    async with asyncio.timeout(WAIT_S):
        while not enough((beat := await beats.next()).memory):
            pass
    await beats.close()
    return beat.memory


async def alternate(leader: Leader) -> dict[str, tuple[bytes, str]]:
    """Requests of both models in turn, all published at once: latent, and digest of the picture."""
    made = {}
    for number in range(4):
        request, wanted = f"r{number}", spec("ab"[number % 2], seed=number)
        await leader.run(request, wanted, [Piece(STEPS, ("w0",))])
        member = leader.member(request, wanted, STEPS, ("w0",))
        made[request] = await leader.assign("vae", Piece(1, ("w0",)), member)
    found = {}
    for request, sequence in made.items():
        done = await leader.ending(sequence)
        assert not done.HasField("failure"), done.failure
        latent = await leader.latent(request, "w0", STEPS)
        found[request] = (latent.to_bytes(), done.results[0].media.sha256)
    return found


def spans_of(workers: Workers, name: str, requests: Container[str]) -> list[SpanRecord]:
    spans = read_spans(workers.pool.state_dir / "traces")
    return [s for s in spans if s.name == name and s.attributes["hocket.request_id"] in requests]


async def test_two_models_in_memory_for_one(wide: Workers, narrow: Workers) -> None:
    """The same bits as with room for both; what comes next loads beside the steps in hand."""
    async with wide.led() as leader:
        expected = await alternate(leader)
        memory = await memory_of(leader, "w0", lambda _: True)
        assert (memory.budget_bytes, memory.loads, memory.evictions) == (0, 0, 0)
        assert sum(part.size_bytes for part in memory.parts) == memory.weights_bytes
    async with narrow.led() as leader:
        before = await memory_of(leader, "w0", lambda _: True)
        assert {(p.model, p.node) for p in before.parts if p.resident} >= {("a", "dit")}
        assert await alternate(leader) == expected
        memory = await memory_of(leader, "w0", lambda _: True)
    assert memory.budget_bytes == 24 * MIB
    assert memory.weights_bytes <= memory.budget_bytes < sum(p.size_bytes for p in memory.parts)
    assert memory.evictions >= 3, "each change of the model makes the other one's denoiser leave"
    assert all(part.load_time_us > 0 for part in memory.parts)
    await until(lambda: spans_of(narrow, "step", ("r3",))[-1:])
    loads = spans_of(narrow, "load", expected)
    assert 4 <= len(loads) <= memory.loads - before.loads, "each is told once"
    first = next(load for load in loads if load.attributes["hocket.part"] == "b/text")
    steps = spans_of(narrow, "step", ("r0",))
    denoised = max(s.end_unix_ns for s in steps if s.attributes["hocket.node"] == "dit")
    assert first.start_unix_ns < denoised, "b's weights come while a's steps run"


async def test_a_group_waits_for_the_member_that_loads(wide: Workers, narrow: Workers) -> None:
    """One member has the model, the other one has to make room for it first."""
    found = []
    for workers in (wide, narrow):
        async with workers.led() as leader:
            await leader.run("of-a", spec("a", 1), [Piece(STEPS, ("w0",))])
            await leader.run("of-b", spec("b", 1), [Piece(STEPS, ("w1",))])
            pieces = [Piece(2, ("w0", "w1")), Piece(2, ("w1",)), Piece(STEPS - 4, ("w1", "w0"))]
            await leader.run("pair", spec("b", 2), pieces)
            latents = [await leader.latent("pair", worker, STEPS) for worker in ("w0", "w1")]
            found.append({latent.to_bytes() for latent in latents})
    assert found[0] == found[1] and len(found[0]) == 1


async def test_parked_latents_are_spilled_and_resumed_elsewhere(
    wide: Workers, narrow: Workers
) -> None:
    """Eight jobs stop after two steps on w0, which has room for two; they go on, on both."""
    jobs = [f"j{number}" for number in range(8)]
    wanted = {job: video(320, 320, 9, steps=4, seed=seed) for seed, job in enumerate(jobs)}
    ends = {job: ("w0", "w1") if n % 3 == 0 else (f"w{n % 2}",) for n, job in enumerate(jobs)}
    found: list[list[bytes]] = []
    for workers in (wide, narrow):
        async with workers.led() as leader:
            for job in jobs:
                await leader.run(job, wanted[job], [Piece(2, ("w0",))])
            await leader.ending(leader.sequence)
            if workers is narrow:
                parked = await memory_of(leader, "w0", lambda now: 0 < now.latents_bytes <= MIB)
                assert parked.latents_budget_bytes == MIB and parked.latents_host_bytes == 0
                assert parked.latents_file_bytes > parked.latents_bytes, "most of them"
            for job in jobs:
                member = leader.member(job, wanted[job], 2, ("w0",))
                await leader.assign("dit", Piece(2, ends[job]), member)
            found.append([(await leader.latent(j, ends[j][-1], 4)).to_bytes() for j in jobs])
            for job in (*jobs, "of-a", "of-b", "pair", "r0", "r1", "r2", "r3"):
                await leader.release(job)
    folder = narrow.pool.state_dir / "latents"
    assert found[0] == found[1] and folder.exists()
    await until(lambda: not list(folder.rglob("*.safetensors")))


async def test_the_live_scheduler_plans_loads_from_what_workers_tell(
    models: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole mesh: control knows no table of weights, and its journal replays."""
    monkeypatch.setenv("HOCKET_MEMORY_MIB", "26")
    monkeypatch.setenv("HOCKET_LATENTS_MIB", "2")
    plan = MeshPlan(tmp_path, workers=1, models=models, log_level="warning")
    async with (
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        asyncio.timeout(WAIT_S),
    ):
        asked = [GenerateRequest(spec=spec("ab"[n % 2], seed=n)) for n in range(4)]
        answers = await asyncio.gather(*(client.generate_media(each) for each in asked))
        for number, (content, _) in enumerate(answers):
            with Image.open(io.BytesIO(content)) as picture:
                apart = np.asarray(picture).astype(int) - plain_picture(seed=number)
            assert np.abs(apart).max() <= 1
        entries = await entries_from_broker(running.nats_url, plan.cluster)
        async with grpc.aio.insecure_channel(running.control) as channel:
            watch = ControlServiceStub(channel).WatchCluster(WatchClusterRequest())
            state = await watch.read()
        status = await asyncio.to_thread(told_by_status, tmp_path)
    (worker,) = state.workers
    assert worker.memory.budget_bytes == 24 * MIB and worker.memory.evictions > 0
    assert {(part.model, part.node) for part in worker.memory.parts} == {
        (model, node) for model in "ab" for node in ("text", "dit", "vae")
    }
    assert "memory budget 24 MiB" in status and "evictions" in status
    found = replay(entries)
    assert found.agrees and found.plans >= 12
    told = [json.loads(entry.observed_json) for entry in entries if entry.observed_json]
    assert any(fact.get("weights") for fact in told), "the journal has what workers told"


def told_by_status(state_dir: Path) -> str:
    command = [sys.executable, "-m", "hocket.cli", "status", f"--state-dir={state_dir}"]
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return run.stdout


def plain_picture(seed: int) -> np.ndarray:
    reference = PlainLoop.load()
    tokens, _ = reference.denoise("a fox on a green background", 64, seed, STEPS, 2.0)
    return reference.decode(tokens, 64).numpy().astype(int)


async def test_a_worker_outlives_a_failed_allocation(
    nats_url: str, wan: Reference, tmp_path: Path
) -> None:
    """Its address space ends a little above what it has: a huge decode fails, a small one works."""
    small, huge = video(48, 32, 9), video(1280, 1280, 33)
    with WorkerPool(nats_url, "memory-out", tmp_path, (wan.folder,), 1) as pool:
        async with Workers(pool).led() as leader:
            first = await decoded(leader, "first", small)
            assert first.results[0].media.sha256
            limit_memory(pool.pid("w0"), 192 * MIB)
            failed = await decoded(leader, "huge", huge)
            assert failed.failure.reason == "OUT_OF_MEMORY", failed.failure
            told = failed.failure.metadata
            assert (told["node"], told["shape"], told["batch"]) == ("vae", "1280x1280x33", "1")
            assert int(told["needed_bytes"]) > 192 * MIB > int(told["free_bytes"]) > 0
            assert failed.results[0].steps_done == 0, "the latent is still there"
            after = await memory_of(leader, "w0", lambda _: True)
            assert after.activations_bytes >= int(told["needed_bytes"])
            again = await decoded(leader, "again", small)
            assert again.results[0].media.sha256 == first.results[0].media.sha256
            assert again.incarnation == leader.beats["w0"].incarnation, "the process is the same"


def limit_memory(pid: int, more_bytes: int) -> None:
    """Lets a process have that much more address space than it has."""
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + more_bytes, used + more_bytes))


def video(
    width: int, height: int, frames: int, steps: int = 1, seed: int = 11
) -> types_pb2.GenerationSpec:
    return types_pb2.GenerationSpec(
        model="tiny-wan",
        prompt="a red fox on the sea",
        shape=types_pb2.Shape(width=width, height=height, frames=frames),
        steps=steps,
        guidance_scale=3.0,
        seed=seed,
        media_type="video/mp4",
    )


async def decoded(
    leader: Leader, request: str, wanted: types_pb2.GenerationSpec
) -> mesh_pb2.StepReport:
    """Noise, decoded as if it were finished."""
    await leader.assign("text", Piece(1, ("w0",)), leader.member(request, wanted, 0, ()))
    member = leader.member(request, wanted, 0, ("w0",))
    return await leader.ending(await leader.assign("vae", Piece(1, ("w0",)), member))
