"""A request that the policy's own admission turns away: its caller hears so, the journal too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.replay import entries_from_broker, replay
from hocket.client import HocketClient
from hocket.errors import RequestFailed, status_code
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import Log
from hocket.v1.generation_pb2 import GenerateRequest, Progress
from hocket.v1.journal_pb2 import JournalEntry, Promise
from hocket.v1.types_pb2 import GenerationSpec, Shape, Slo

WAIT_S = 60.0
HEADER = "model,gpu,node,width,height,frames,degree,batch,call_us,source"
CALLS_US = {"text": 1000, "dit": 50_000, "vae": 1000}


def asked(steps: int, deadline_s: float = 0.0) -> GenerateRequest:
    spec = GenerationSpec(prompt="a fox", shape=Shape(width=64, height=64), steps=steps)
    return GenerateRequest(spec=spec, slo=Slo(deadline_us=int(deadline_s * 1e6)))


async def finish(client: HocketClient, request: GenerateRequest, begun: asyncio.Event) -> None:
    async for event in client.generate(request):
        if isinstance(event, Progress):
            begun.set()


async def journal(running: RunningMesh) -> list[JournalEntry]:
    return await entries_from_broker(running.nats_url, "local")


async def promises(running: RunningMesh) -> list[Promise]:
    bus, subjects = await Bus.connect(running.nats_url, "test"), Subjects("local")
    try:
        stream = Log(bus, subjects.promises_stream)
        found = [entry async for entry in stream.read(subjects.promises)]
    finally:
        await bus.close()
    requests = [entry for entry in found if ".promise.request." in entry.subject]
    return [Promise.FromString(entry.data) for entry in requests]


async def test_the_caller_of_a_request_turned_away_hears_why(tmp_path: Path) -> None:
    """DiFlow on one worker, which is taken: a deadline that leaves no slack is not admitted."""
    profile = tmp_path / "profile.csv"
    rows = (f"m,emulated,{node},64,64,1,1,1,{us},[T]" for node, us in CALLS_US.items())
    profile.write_text("\n".join((HEADER, *rows)) + "\n")
    plan = MeshPlan(
        state_dir=tmp_path,
        workers=1,
        policy="diflow",
        executor="emulated",
        profile=str(profile),
        log_level="warning",
    )
    async with (
        asyncio.timeout(WAIT_S),
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        asyncio.TaskGroup() as tasks,
    ):
        begun = asyncio.Event()
        tasks.create_task(finish(client, asked(steps=40), begun))
        await begun.wait()
        with pytest.raises(RequestFailed) as caught:
            await finish(client, asked(steps=10, deadline_s=0.5), asyncio.Event())
        assert caught.value.reason == "REJECTED_BY_POLICY"
        assert status_code(caught.value).name == "RESOURCE_EXHAUSTED"
        assert "early abort" in str(caught.value)
        entries = await journal(running)
        ended = [p.ended for p in await promises(running) if p.HasField("ended")]
    assert [e.failed.metadata["policy_reason"] for e in ended] == ["EARLY_ABORT"]
    assert replay(entries).agrees
