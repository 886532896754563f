"""A worker reports as itself: the broker's permissions are by subject, and what a payload says of
its sender has to agree with it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import generation_pb2, mesh_pb2
from tests.control.replica import asking, replica

WAIT_S = 60.0


async def test_what_is_said_for_another_worker_is_refused_and_counted(
    nats_url: str, bus: Bus, subjects: Subjects, tmp_path: Path
) -> None:
    def beat(worker: str) -> mesh_pb2.Heartbeat:
        model = generation_pb2.ModelInfo(name="m")
        told = mesh_pb2.Heartbeat(worker=worker, incarnation="1", sequence=1, models=[model])
        told.device.profile_name = "cpu"
        return told

    async with (
        asyncio.timeout(WAIT_S),
        replica(nats_url, subjects.cluster, tmp_path, lease_us=WAIT_S * 2_000_000) as one,
        asking(await one.leads()) as client,
    ):
        report = mesh_pb2.StepReport(worker="w1", incarnation="1", node="dit")
        await bus.publish(subjects.heartbeat("w0"), beat("w1"))
        await bus.publish(subjects.report("w0"), report)
        await bus.publish(subjects.heartbeat("w2"), beat("w2"))
        told = await client.cluster_with(
            lambda c: len(c.workers) and c.troubles["refused messages"] > 1
        )
        assert [worker.name for worker in told.workers] == ["w2"]
        assert told.troubles["refused messages"] == 2
