"""The agent against a real broker: what it does when the object store refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nats.js.api import ObjectStoreConfig
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer

from gpuworker.agent import Agent, void
from gpuworker.config import WorkerSettings
from gpuworker.emulation.executor import EmulatedExecutor, EmulatedHost
from hocket.clock import ManualClock
from hocket.messaging.bus import Bus, Subjects
from hocket.tracing import spans
from hocket.v1 import mesh_pb2, types_pb2

STEP_US = 1000
ROOM_BYTES = 700  # for one blank picture with its entry, not for two
WAIT_S = 60.0


async def test_media_that_cannot_be_stored_are_a_reported_failure(
    nats_url: str, tmp_path: Path
) -> None:
    """A full store: the agent tries again for a while, reports, and lives on."""
    bus = await Bus.connect(nats_url, "agent")
    subjects = Subjects("full-store")
    full = ObjectStoreConfig(bucket=subjects.media_bucket, max_bytes=16)
    await bus.jetstream.create_object_store(subjects.media_bucket, full)
    clock = ManualClock()
    cell = ("m", "text", 8, 8, 1, 1)
    host = EmulatedHost(clock, {cell: STEP_US, ("m", "vae", 8, 8, 1, 1): STEP_US})
    executor = EmulatedExecutor("w0", host, "cpu")
    settings = WorkerSettings(cluster="full-store", state_dir=tmp_path, heartbeat_us=1 << 40)
    agent = Agent("w0", settings, bus, executor, clock, NoOpTracer())
    beats = await bus.follow(subjects.heartbeat("w0"), mesh_pb2.Heartbeat)
    reports = await bus.follow(subjects.report("w0"), mesh_pb2.StepReport)
    running = asyncio.ensure_future(agent.run())
    async with asyncio.timeout(WAIT_S):
        await beats.next()
        message = mesh_pb2.Assign(term=1, assignments=[job(1, "text"), job(2, "vae")])
        await bus.publish(subjects.assign("w0"), message)
        failed = await report_of(reports, 2, clock)
    assert failed.failure.reason == "MEDIA_NOT_STORED"
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await executor.close()
    await bus.close()


async def test_each_file_of_a_batch_is_stored_and_told_by_itself(
    nats_url: str, tmp_path: Path
) -> None:
    """A store with room for one file: one job is done, the other is named and keeps its turn."""
    bus = await Bus.connect(nats_url, "agent")
    subjects = Subjects("small-store")
    small = ObjectStoreConfig(bucket=subjects.media_bucket, max_bytes=ROOM_BYTES)
    await bus.jetstream.create_object_store(subjects.media_bucket, small)
    clock = ManualClock()
    cells = {("m", node, 8, 8, 1, 1): STEP_US for node in ("text", "vae")}
    executor = EmulatedExecutor("w0", EmulatedHost(clock, cells), "cpu", batch_max=2)
    settings = WorkerSettings(cluster="small-store", state_dir=tmp_path, heartbeat_us=1 << 40)
    agent = Agent("w0", settings, bus, executor, clock, NoOpTracer())
    beats = await bus.follow(subjects.heartbeat("w0"), mesh_pb2.Heartbeat)
    reports = await bus.follow(subjects.report("w0"), mesh_pb2.StepReport)
    running = asyncio.ensure_future(agent.run())
    async with asyncio.timeout(WAIT_S):
        await beats.next()
        both = [job(1, "text", "r", "s"), job(2, "vae", "r", "s")]
        await bus.publish(subjects.assign("w0"), mesh_pb2.Assign(term=1, assignments=both))
        first = await report_of(reports, 2, clock)
        second = await report_of(reports, 2, clock)
    stored, failed = (second, first) if first.HasField("failure") else (first, second)
    (done,) = stored.results
    assert done.media.object_name == done.request_id and not stored.HasField("failure")
    assert failed.failure.reason == "MEDIA_NOT_STORED"
    other = failed.failed_job.request_id
    assert {done.request_id, other} == {"r", "s"}
    assert [r.request_id for r in failed.results] == [other]
    assert (first.last, second.last) == (False, True)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await executor.close()
    await bus.close()


async def test_report_and_trace_say_how_much_of_a_step_was_whose(
    nats_url: str, tmp_path: Path
) -> None:
    bus = await Bus.connect(nats_url, "agent")
    subjects, clock, exporter = Subjects("own-times"), ManualClock(), InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    cells = {("m", "text", 8, 8, 1, 1): STEP_US, ("m", "dit", 8, 8, 1, 2): STEP_US}
    host = EmulatedHost(clock, cells)
    first, second = (EmulatedExecutor(name, host, "cpu") for name in ("w0", "w1"))
    settings = WorkerSettings(cluster="own-times", state_dir=tmp_path, heartbeat_us=1 << 40)
    agent = Agent("w0", settings, bus, first, clock, provider.get_tracer("test"))
    beats = await bus.follow(subjects.heartbeat("w0"), mesh_pb2.Heartbeat)
    reports = await bus.follow(subjects.report("w0"), mesh_pb2.StepReport)
    running = asyncio.ensure_future(agent.run())
    second.start(void)
    second.accept_term(1)
    shared = job(2, "dit")
    shared.group.members.append("w1")
    async with asyncio.timeout(WAIT_S):
        await beats.next()
        message = mesh_pb2.Assign(term=1, assignments=[job(1, "text"), shared])
        await bus.publish(subjects.assign("w0"), message)
        second.submit(shared)
        alone, both = [await report_of(reports, sequence, clock) for sequence in (1, 2)]
    assert not alone.member_time_us
    assert list(both.member_time_us) == [STEP_US, STEP_US] and list(both.members) == ["w0", "w1"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    told = [dict(s.attributes or {}).get(spans.MEMBERS_US) for s in exporter.get_finished_spans()]
    assert told == [None, (STEP_US, STEP_US)]
    for executor in (first, second):
        await executor.close()
    await bus.close()


def job(sequence: int, node: str, *requests: str) -> mesh_pb2.Assignment:
    spec = types_pb2.GenerationSpec(model="m", shape=types_pb2.Shape(width=8, height=8), steps=1)
    holder = types_pb2.LatentHolder(worker="w0", steps_done=0)
    batch = [
        mesh_pb2.BatchMember(request_id=request, spec=spec, steps_total=1, holders=[holder])
        for request in requests or ("r",)
    ]
    return mesh_pb2.Assignment(
        sequence=sequence,
        node=node,
        term=1,
        steps=1,
        batch=batch,
        group=types_pb2.Group(epoch=1, members=["w0"]),
    )


async def report_of(reports: object, sequence: int, clock: ManualClock) -> mesh_pb2.StepReport:
    """The assignment's report; time goes on whenever somebody waits for it."""
    next_report = asyncio.ensure_future(reports.next())  # type: ignore[attr-defined]
    while True:
        await asyncio.wait([next_report], timeout=0.01)
        if next_report.done():
            if next_report.result().sequence == sequence:
                return next_report.result()
            next_report = asyncio.ensure_future(reports.next())  # type: ignore[attr-defined]
        wake_us = clock.next_wake_us()
        if wake_us is not None and wake_us < 1 << 39:
            clock.advance_to(wake_us)
