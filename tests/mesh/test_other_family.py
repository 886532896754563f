"""Same picture in another family: a tiny random Wan (video, real guidance, two forwards a step),
served from an ordinary diffusers folder, ends at the latent of the stock WanPipeline, and its video
reaches the caller.

Real worker processes, a real broker, a scripted leader in control's place.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from PIL import Image

from bench.mesh.scripted_leader import Leader, Piece, WorkerPool
from gpuworker.state import LatentState
from hocket.client import HocketClient
from hocket.errors import InvalidRequest
from hocket.launching.launcher import MeshPlan, mesh
from hocket.messaging.bus import Bus
from hocket.v1 import types_pb2
from hocket.v1.generation_pb2 import GenerateRequest
from tests.worker.tiny_models import Reference, wan_latents, wan_reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, random_schedule

STEPS = 8
LONG = 100  # steps of the job whose worker is killed: the kill shall find it under way
WAIT_S = 120.0
MP4_LEVELS = 6.0  # mean, of 255: half the chroma and the codec, on pixels that are nearly noise
_terms = itertools.count(1)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers need the cores
    made = wan_reference(tmp_path_factory.mktemp("models") / "tiny-wan")
    assert made.settings["steps"] == STEPS
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pool(
    nats_url: str, wan: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerPool]:
    state = tmp_path_factory.mktemp("pool")
    with WorkerPool(nats_url, "other-family", state, (wan.folder,)) as workers:
        yield workers


@pytest.fixture
async def leader(nats_url: str, pool: WorkerPool) -> AsyncIterator[Leader]:
    bus = await Bus.connect(nats_url, "leader")
    scripted = Leader(bus, pool.cluster, next(_terms))
    await scripted.listen(pool.count)
    yield scripted
    await bus.close()


def spec(wan: Reference, **changed: Any) -> types_pb2.GenerationSpec:
    """The reference's settings as the API says them; the model is named like its folder."""
    have = {**wan.settings, **changed}
    return types_pb2.GenerationSpec(
        model=Path(wan.folder).name,
        prompt=have["prompt"],
        negative_prompt=have["negative_prompt"],
        shape=types_pb2.Shape(width=have["width"], height=have["height"], frames=have["frames"]),
        steps=have["steps"],
        guidance_scale=have["guidance_scale"],
        seed=have["seed"],
    )


def drawn(seed: int) -> list[Piece]:
    """A random schedule: pieces on 1, 2 or 4 workers in any order."""
    return [
        Piece(steps, tuple(f"w{place}" for place in places), layout.cfg, layout.ring)
        for places, steps, layout in random_schedule(seed, STEPS, cfg=(1, 2))
    ]


SCHEDULES = {
    "1-2-4-2-1": [
        Piece(1, ("w0",)),
        Piece(2, ("w0", "w1")),
        Piece(2, ("w3", "w0", "w2", "w1")),
        Piece(2, ("w2", "w1")),
        Piece(1, ("w1",)),
    ],
    "disjoint-moves": [Piece(3, ("w0", "w1")), Piece(3, ("w3", "w2")), Piece(2, ("w0",))],
    **{f"drawn-with-seed-{seed}": drawn(seed) for seed in range(200, 204)},
}


@pytest.mark.parametrize("name", SCHEDULES)
async def test_final_latent_is_that_of_the_stock_pipeline(
    name: str, leader: Leader, wan: Reference
) -> None:
    schedule = SCHEDULES[name]
    await leader.run(name, spec(wan), schedule)
    state = await leader.latent(name, schedule[-1].workers[0], STEPS)
    assert difference(state, wan.latents) <= LATENT_TOLERANCE, f"{name}: {schedule}"


async def test_comparison_sees_another_seed(leader: Leader, wan: Reference) -> None:
    """The planted negative."""
    await leader.run("planted", spec(wan, seed=12), SCHEDULES["disjoint-moves"])
    state = await leader.latent("planted", "w0", STEPS)
    assert difference(state, wan.latents) > 0.1
    theirs = wan_latents({**wan.settings, "seed": 12})
    assert difference(state, theirs[-1]) <= LATENT_TOLERANCE


async def test_a_killed_worker_costs_steps_and_no_video(
    nats_url: str, tmp_path: Path, wan: Reference
) -> None:
    """kill -9 in the middle of a group's steps: the survivor's latent goes on, on one, then two."""
    bus = await Bus.connect(nats_url, "leader")
    long = spec(wan, steps=LONG)
    with WorkerPool(nats_url, "other-killed", tmp_path, (wan.folder,), 3) as workers:
        leader = Leader(bus, "other-killed", 1)
        await leader.listen(3)
        await leader.assign("text", Piece(1, ("w0",)), leader.member("killed", long, 0, ()))
        member = leader.member("killed", long, 0, ("w0",))
        sequence = await leader.assign("dit", Piece(LONG, ("w0", "w1")), member)
        await leader.progress(sequence, at_least=3)
        workers.kill("w1")
        failed = await leader.ending(sequence)
        assert (failed.failure.reason, failed.worker) == ("GROUP_LOST", "w0")
        done = failed.results[0].steps_done
        assert 3 <= done < LONG - STEPS, "killed under way"
        alone = leader.member("killed", long, done, ("w0",), attempt=1)
        await leader.assign("dit", Piece(3, ("w2",)), alone)
        pair = leader.member("killed", long, done + 3, ("w2",), attempt=1)
        await leader.assign("dit", Piece(STEPS - 3, ("w0", "w2")), pair, epoch=2)
        state = await leader.latent("killed", "w2", done + STEPS)
    await bus.close()
    theirs = wan_latents({**wan.settings, "steps": LONG})[done + STEPS - 1]
    assert difference(state, theirs) <= LATENT_TOLERANCE, f"killed after step {done}"


@pytest.fixture
def served(wan: Reference, tmp_path: Path) -> Path:
    """The model with a card.json that names what the gateway offers: the reference's shape."""
    folder = Path(shutil.copytree(wan.folder, tmp_path / "served-wan"))
    facts = json.loads((folder / "card.json").read_text())
    have = wan.settings
    facts |= {"sizes": [[have["width"], have["height"]]], "frames_max": have["frames"], "fps": 12}
    (folder / "card.json").write_text(json.dumps(facts))
    return folder


@asynccontextmanager
async def serving(folder: Path, tmp_path: Path) -> AsyncIterator[tuple[str, HocketClient]]:
    """The whole mesh, as `hocket up` starts it, with two workers: its address, and a client."""
    plan = MeshPlan(tmp_path / "state", workers=2, models=(str(folder),), log_level="warning")
    async with (
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        asyncio.timeout(WAIT_S),
    ):
        yield running.gateway, client


async def test_a_video_arrives_over_grpc_and_plays(
    wan: Reference, served: Path, tmp_path: Path
) -> None:
    """The whole mesh, as `hocket up` starts it: MP4 and WebP are the stock pipeline's frames."""
    asked = GenerateRequest(spec=spec(wan))
    asked.spec.model = served.name
    async with serving(served, tmp_path) as (_, client):
        (info,) = await client.models()
        assert [(s.frames, s.fps) for s in info.shapes] == [(wan.settings["frames"], 12)]
        content, finished = await client.generate_media(asked)
        made = finished.media
        assert (made.media_type, made.fps, made.duration_us) == ("video/mp4", 12, 750_000)
        assert (made.width, made.height, made.frames) == (48, 32, 9)
        frames = mp4_frames(content, fps=12)
        assert levels_apart(frames, wan.frames).mean() <= MP4_LEVELS
        assert levels_apart(255 - frames, wan.frames).mean() > 3 * MP4_LEVELS, "planted"

        asked.spec.media_type, asked.spec.shape.fps = "image/webp", 20
        content, finished = await client.generate_media(asked)
        assert (finished.media.media_type, finished.media.fps) == ("image/webp", 20)
        frames = webp_frames(content, frame_ms=50)
        assert levels_apart(frames, wan.frames).max() <= 1

        asked.spec.media_type = "image/png"
        with pytest.raises(InvalidRequest, match=r"spec\.media_type"):
            await client.generate_media(asked)


async def test_a_video_has_as_many_frames_as_asked_for(
    wan: Reference, served: Path, tmp_path: Path
) -> None:
    """Other lengths than the model's own, from the request to the file: of the stock pipeline."""
    shorter = wan_reference(tmp_path / "tiny-wan", frames=5)
    asked = GenerateRequest(spec=spec(wan))
    asked.spec.model = served.name
    async with serving(served, tmp_path) as (gateway, client):
        (info,) = await client.models()
        told = info.frames
        assert (told.minimum, told.maximum, told.multiple, told.offset) == (1, 9, 4, 1)
        assert told.default_count == 9
        asked.spec.shape.frames, asked.spec.shape.fps = 5, 10
        content, finished = await client.generate_media(asked)
        made = finished.media
        assert (made.frames, made.fps, made.duration_us) == (5, 10, 500_000)
        frames = mp4_frames(content, fps=10)
        assert levels_apart(frames, shorter.frames).mean() <= MP4_LEVELS
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            assert stream.frames == 5
            assert stream.duration is not None and stream.time_base is not None
            assert float(stream.duration * stream.time_base) == pytest.approx(0.5, abs=1e-3)

        asked.spec.media_type = "image/webp"
        content, finished = await client.generate_media(asked)
        assert (finished.media.frames, finished.media.fps) == (5, 10)
        assert levels_apart(webp_frames(content, frame_ms=100), shorter.frames).max() <= 1

        for frames_asked, near in ((6, 5), (13, 9)):
            asked.spec.shape.frames = frames_asked
            with pytest.raises(InvalidRequest, match=rf"found {frames_asked}; .*nearest: {near}"):
                await client.generate_media(asked)
        status, listed = await asyncio.to_thread(told_by, "models", gateway)
        assert status == 0 and "1-9, 4k+1 (9)" in listed
        clip = tmp_path / "clip.mp4"
        options = ("--frames=5", "--fps=10", "--steps=2", f"--output={clip}")
        status, listed = await asyncio.to_thread(
            told_by, "generate", gateway, "a red fox", *options
        )
        assert status == 0 and "48x32x5@10" in listed, listed
        assert len(mp4_frames(clip.read_bytes(), fps=10)) == 5


def told_by(command: str, gateway: str, *arguments: str) -> tuple[int, str]:
    """What the command line says, on a wide terminal."""
    whole = [sys.executable, "-m", "hocket.cli", command, *arguments, f"--address={gateway}"]
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)
    return run.returncode, run.stdout + run.stderr


def mp4_frames(content: bytes, fps: int) -> np.ndarray:
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].average_rate == fps
        decoded = container.decode(video=0)
        return np.stack([f.to_ndarray(format="rgb24", interpolation=exact) for f in decoded])


def webp_frames(content: bytes, frame_ms: int) -> np.ndarray:
    frames = []
    with Image.open(io.BytesIO(content)) as animation:
        for number in range(animation.n_frames):  # type: ignore[attr-defined]
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")))
            assert animation.info["duration"] == frame_ms
    return np.stack(frames)


def levels_apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs.astype(int))


def difference(ours: LatentState, theirs: torch.Tensor) -> float:
    latents = ours.tensors["latents"]
    assert latents.shape == theirs.shape and latents.dtype == theirs.dtype == torch.float32
    return float((latents - theirs).abs().max())


def test_schedules_are_drawn_the_same_everywhere() -> None:
    assert drawn(200) == drawn(200)
    assert {len(p.workers) for s in range(200, 204) for p in drawn(s)} == {1, 2, 4}
