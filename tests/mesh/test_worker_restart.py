"""Real workers of one command: one is killed and comes back, all are told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from bench.mesh.scripted_leader import Leader, Piece, WorkerPool
from gpuworker.config import EMBEDDED_MODEL
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2, types_pb2

WAIT_S = 120.0


async def test_a_killed_worker_comes_back_and_says_how_often(nats_url: str, tmp_path: Path) -> None:
    bus, subjects = await Bus.connect(nats_url, "leader"), Subjects("restarts")
    beats = await bus.follow(subjects.heartbeat("*"), mesh_pb2.Heartbeat)
    pool = WorkerPool(nats_url, "restarts", tmp_path, (str(EMBEDDED_MODEL),), count=2)
    seen: dict[str, mesh_pb2.Heartbeat] = {}
    async with asyncio.timeout(WAIT_S):
        with pool:
            while len(seen) < 2:
                beat = await beats.next()
                seen[beat.worker] = beat
            assert {one.restarts for one in seen.values()} == {0}
            before = seen["w1"].incarnation
            pool.kill("w1")
            while beat.worker != "w1" or beat.incarnation == before:
                beat = await beats.next()
            assert beat.restarts == 1 and not beat.leaving
        leaving = set()
        while len(leaving) < 2:
            if (beat := await beats.next()).leaving:
                leaving.add(beat.worker)
    assert pool.process is not None and pool.process.returncode == 0
    await bus.close()


async def test_a_worker_that_is_told_to_stop_hands_its_latent_over_first(
    nats_url: str, tmp_path: Path
) -> None:
    """SIGTERM: control sends another worker for the latent, releases it, and only then it goes."""
    bus, leader_bus = [await Bus.connect(nats_url, name) for name in ("test", "leader")]
    leader = Leader(leader_bus, "hand-over", term=1)
    beats = await bus.follow(leader.subjects.heartbeat("*"), mesh_pb2.Heartbeat)
    spec = types_pb2.GenerationSpec(
        model="hocket-emoji",
        prompt="a fox",
        shape=types_pb2.Shape(width=64, height=64, frames=1),
        steps=4,
        guidance_scale=2.0,
        seed=3,
    )

    async def beat_of(worker: str) -> mesh_pb2.Heartbeat:
        while (beat := await beats.next()).worker != worker:
            pass
        return beat

    pool = WorkerPool(nats_url, "hand-over", tmp_path, (str(EMBEDDED_MODEL),), count=2)
    async with asyncio.timeout(WAIT_S):
        with pool:
            await leader.listen(2)
            begun = await leader.assign("text", Piece(1, ("w0",)), leader.member("r", spec, 0, ()))
            assert (await leader.ending(begun)).results[0].request_id == "r"
            os.kill(pool.pid("w0"), signal.SIGTERM)
            while not (beat := await beat_of("w0")).stopping:
                pass
            assert [held.request_id for held in beat.latents] == ["r"] and not beat.leaving
            (holder,) = leader.member("r", spec, 0, ("w0",)).holders
            fetch = mesh_pb2.LatentFetch(request_id="r", holder=holder, model=spec.model)
            message = mesh_pb2.Assign(term=1, fetches=[fetch])
            await bus.publish(leader.subjects.assign("w1"), message)
            while not (beat := await beat_of("w1")).latents:
                pass
            assert [(h.request_id, h.steps_done) for h in beat.latents] == [("r", 0)]
            message = mesh_pb2.Assign(term=1, released=["r"])
            await bus.publish(leader.subjects.assign("w0"), message)
            while not (await beat_of("w0")).leaving:
                pass
            steps = await leader.assign(
                "dit", Piece(4, ("w1",)), leader.member("r", spec, 0, ("w1",))
            )
            ended = await leader.ending(steps)
            assert not ended.HasField("failure") and ended.results[0].steps_done == 4
    for connection in (bus, leader_bus):
        await connection.close()
