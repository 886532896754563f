"""Batches through the whole mesh: real workers, one killed in mid-batch, one job cancelled."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import grpc

from hocket.client import HocketClient
from hocket.errors import HocketError
from hocket.launching.launcher import MeshPlan, mesh
from hocket.messaging.bus import Bus, Subjects
from hocket.v1.control_pb2 import SubmitRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.mesh_pb2 import StepReport
from tests.mesh.test_whole_mesh import WAIT_S, Called, asked, kill, levels_apart, plain_picture
from tests.waiting import until

STEPS = 40
SEEDS = {"a": 21, "b": 22, "c": 23}


async def test_who_shares_a_batch_with_the_cancelled_and_the_killed_gets_its_own_picture(
    tmp_path: Path,
) -> None:
    """While one request has the only worker, three wait; they run together, until one of them is
    cancelled and then the worker dies. Another one comes and does the rest.
    """
    plan = MeshPlan(
        state_dir=tmp_path, workers=1, policy="genserve", batch_max=8, log_level="warning"
    )
    async with (
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        asyncio.timeout(2 * WAIT_S),
    ):
        bus = await Bus.connect(running.nats_url, "test")
        reports = await bus.follow(Subjects(plan.cluster).report("*"), StepReport)
        first = Called()
        ahead = asyncio.ensure_future(first.run(client, asked(128, 60, 20)))
        await first.denoising.wait()
        calls = {name: Called() for name in SEEDS}
        tasks = {
            name: asyncio.ensure_future(call.run(client, asked(64, STEPS, SEEDS[name])))
            for name, call in calls.items()
        }
        await until(lambda: all(call.accepted for call in calls.values()))
        names = {c.accepted.request_id: name for name, c in calls.items() if c.accepted}

        def of(report: StepReport) -> set[str]:
            return {names.get(r.request_id, "") for r in report.results}

        together = await told(reports, lambda r: r.node == "dit" and of(r) == set(SEEDS))
        await client.cancel(next(r for r, name in names.items() if name == "b"))
        await told(reports, lambda r: r.sequence == together.sequence and of(r) == {"a", "c"})
        kill(tmp_path, "w0")
        command = [sys.executable, "-m", "gpuworker", "--name-prefix=w", "--first-index=9"]
        command += [f"--nats-url={running.nats_url}", f"--state-dir={tmp_path}", "--batch-max=8"]
        command += ["--log-level=warning"]
        second = await asyncio.create_subprocess_exec(*command)
        try:
            cancelled = (await asyncio.gather(tasks["b"], return_exceptions=True))[0]
            await asyncio.gather(ahead, tasks["a"], tasks["c"])
        finally:
            second.send_signal(signal.SIGTERM)
            await second.wait()
            await bus.close()
    assert isinstance(cancelled, HocketError) and calls["b"].finished is None
    assert levels_apart(first.picture, plain_picture(128, 60, 20)) <= 1
    for name in "ac":
        assert calls[name].finished is not None
        assert levels_apart(calls[name].picture, plain_picture(64, STEPS, SEEDS[name])) <= 1


async def told(reports: object, wanted: Callable[[StepReport], bool]) -> StepReport:
    """The first report that is as wanted."""
    while True:
        report = await reports.next()  # type: ignore[attr-defined]
        if wanted(report):
            return report  # type: ignore[no-any-return]


async def test_control_reckons_the_branches_of_guidance_itself(tmp_path: Path) -> None:
    """An older gateway passes on what its caller wrote."""
    plan = MeshPlan(state_dir=tmp_path, workers=1, log_level="warning")
    async with (
        mesh(plan, lambda _: None) as running,
        grpc.aio.insecure_channel(running.control) as channel,
        asyncio.timeout(WAIT_S),
    ):
        stub = ControlServiceStub(channel)
        for number, (said, scale, branches) in enumerate([(1, 2.0, 2), (7, 2.0, 2)]):
            request = asked(64, 5, 1)
            request.spec.model = "hocket-emoji"
            request.spec.guidance_scale = scale
            request.spec.guidance_branches = said
            answer = await stub.Submit(SubmitRequest(request_id=f"old{number}", request=request))
            assert answer.accepted.effective_spec.guidance_branches == branches
