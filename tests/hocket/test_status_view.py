"""`hocket status`: what it tells, within 80 columns."""

from __future__ import annotations

import io

from rich.console import Console

from hocket.cli.status_view import status_view
from hocket.launching.mesh_file import Process
from hocket.v1.control_pb2 import (
    PoolStatus,
    PromiseFigures,
    ReplicaStatus,
    WatchClusterResponse,
    WorkerStatus,
)
from hocket.v1.generation_pb2 import ModelInfo
from hocket.v1.types_pb2 import Memory, PartWeights

COLUMNS = 80


def shown(state: WatchClusterResponse, *processes: Process) -> str:
    console = Console(file=io.StringIO(), width=COLUMNS)
    for part in status_view(state, processes):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= COLUMNS for line in text.splitlines()), text
    return str(text)


def test_restarts_replicas_promises_and_troubles_are_told() -> None:
    state = WatchClusterResponse(
        workers=[
            WorkerStatus(
                name="rack-12-host-07-15",
                state="draining",
                heartbeat_age_us=212_000,
                memory_used_bytes=71 << 30,
                memory_total_bytes=80 << 30,
                memory=Memory(weights_bytes=33 << 30, latents_bytes=5 << 20),
                restarts=3,
                latents_alone=2,
                note="quarantined: 3 failures in a row; next try in 12 s",
                slowdown=1.4,
            )
        ],
        replicas=[
            ReplicaStatus(address="10.11.12.13:50052", role="leader"),
            ReplicaStatus(address="10.11.12.14:50052", role="standby", age_us=400_000),
        ],
        promises=PromiseFigures(promised=200, kept=199, with_deadline=220, on_time=205),
        troubles={"dropped messages": 3, "refused heartbeats": 1},
        policy="hocket",
        pools=[
            PoolStatus(gpu="h100", workers=6, wanted=8, reason="queue", needed=7.4),
            PoolStatus(model="flux.1-dev", gpu="h100", workers=6, wanted=8, reason="late"),
        ],
        models=[ModelInfo(name="flux.1-dev", workers=6), ModelInfo(name="wan", workers=0)],
    )
    gateway = Process(
        name="gateway-2", pid=4711, command="x", restarts=2, ended="was killed by SIGKILL"
    )
    text = shown(state, gateway, Process(name="nats", pid=0, command="y"))
    assert text.splitlines()[1].startswith("rack-12-host-07-15  draining")
    assert text.splitlines()[1].split()[-1] == "4", "started four times"
    assert "quarantined: 3 failures in a row" in text and "1.40 times as long" in text
    assert "holds 2 latents that nobody else has" in text
    assert "standby" in text and "400 ms ago" in text
    assert "gateway-2" in text and "was killed by SIGKILL" in text and "down" in text
    assert "told on time: 200, of those kept: 199 (99.5%)" in text
    assert "dropped messages 3, refused heartbeats 1" in text
    assert "all models  h100  6        8       queue  7.40" in text
    assert "models: flux.1-dev, wan (no worker)" in " ".join(text.split())


def test_an_older_control_shows_workers_only() -> None:
    text = shown(WatchClusterResponse(policy="edf", workers=[WorkerStatus(name="w0")]))
    assert "w0" in text and "replicas" not in text and "troubles" not in text


def test_a_part_that_models_share_is_counted_once() -> None:
    parts = [
        PartWeights(model=model, node="text", part=part, resident=part != "clip-b")
        for model, part in (("a", "clip-a"), ("a", "t5"), ("b", "clip-b"), ("b", "t5"))
    ]
    parts.append(PartWeights(model="c", node="text", resident=True))  # of an older worker
    worker = WorkerStatus(name="w0", memory=Memory(weights_bytes=7 << 20, parts=parts))
    assert "7.0 (3/4)" in shown(WatchClusterResponse(workers=[worker]))
