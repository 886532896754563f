"""Real workers of one command: one is killed and comes back, all are told to stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.scripted_leader import WorkerPool
from gpuworker.config import EMBEDDED_MODEL
from hocket.bus import Bus, Subjects
from hocket.v1 import mesh_pb2

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
